"""benchmarks.structured_output: its arithmetic, and a run on a CPU."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import structured_output
from benchmarks.common import BenchmarkError
from tests.unit.benchmarks.test_benchmarks import common_flags
from tests.unit.benchmarks.test_gaps import MS, step


def test_speeds_are_compared_by_pairs() -> None:
    runs = {"plain": [1.0, 2.0, 4.0], "schema": [1.25, 2.0, 5.0]}
    assert structured_output.speeds(runs, 100) == {
        "plain_tok_s": 50.0,
        "schema_tok_s": 50.0,
        "ratio": 0.8,
        "ratios": [0.8, 1.0, 0.8],
        "limit": 0.9,
    }


def test_what_is_added_to_a_step_is_over_the_usual_plain_one() -> None:
    plain = [step(i) for i in range(6)]
    late = [dataclasses.replace(s, sampled_ns=s.sampled_ns + (MS if s.step_id == 3 else 0)) for s in plain]
    times = structured_output.step_times([plain], [late, plain])
    assert times["plain_ms"] == {"mean": 2.0, "p50": 2.0, "p99": 2.0, "worst": 2.0}
    assert (times["added_ms"]["mean"], times["added_ms"]["worst"]) == (0.0, 1.0)
    assert times["schema_ms"]["worst"] == 3.0


def test_steps_count_where_all_rows_decode() -> None:
    steps = [step(i, num_sampled=4 if i not in (0, 9) else 1) for i in range(10)]
    (stretch,) = structured_output.stretches_of(steps, [range(10)], 4, 2)
    assert [s.step_id for s in stretch] == [3, 4, 5, 6]
    with pytest.raises(BenchmarkError, match="too few"):
        structured_output.stretches_of(steps, [range(2, 6)], 4, 2)


def test_it_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    flags = [*common_flags(16), "--set", "api_server_count=0", "--pairs", "2", "--schema", "short_strings"]
    structured_output.main(["embedded", *flags, "--out", str(out)])
    report = json.loads(out.read_text())
    assert (report["commit"], report["device"], report["num_rows"], report["num_tokens"]) == ("abc", "cpu", 4, 64)
    assert report["schema"] == "short_strings"
    assert report["plain_tok_s"] > 0 and report["schema_tok_s"] > 0 and len(report["ratios"]) == 2
    assert report["steps"]["added_ms"]["worst"] >= report["steps"]["added_ms"]["mean"]
    assert structured_output.table(report) in capsys.readouterr().out
