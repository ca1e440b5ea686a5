"""The head of docs/performance.md against the results files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import summary
from benchmarks.common import RESULTS
from benchmarks.step_times import CONTEXT
from benchmarks.throughput import DECODE_PROMPT_LEN, DECODE_STEPS

TEXT = summary.DOCUMENT.read_text()
NUM_WARMUP, NUM_TIMED, NUM_PROFILED = 3, 60, 5
"""The steps that benchmarks.step_times runs of each size, in this order; the step before them makes the context."""


def read(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return report


def test_the_tables_are_those_of_the_results() -> None:
    assert summary.filled(TEXT, RESULTS) == TEXT, "run make bench-plot"


def test_numbers_and_commits_come_from_the_files(tmp_path: Path) -> None:
    for name in summary.FILES.values():
        report = read(name)
        report["rows"]["nano256"]["median"] = 3.25
        report["commit"] = "a" * 40 if "tp2" in name else "b" * 40
        (tmp_path / name).write_text(json.dumps(report))
    table = summary.speeds(tmp_path)
    assert re.findall(r"\*\*(3\.25)\*\* / 7\.52 / 8\.65 s", table) == ["3.25"]
    assert table.count("**3.25**") == 3
    assert table.splitlines()[-1] == "| commit of Tandem | bbbbbbb | bbbbbbb | aaaaaaa, **another** |"
    assert summary.commits(tmp_path, f"`{name}` `no.json`").splitlines()[2:] == [
        f"| {name} | aaaaaaa, **another** | {report['date'][:10]} |"
    ]


@pytest.mark.parametrize(
    ("alone", "through_grpc"),
    [
        ("step_times_0.6b.json", "throughput_0.6b_temperature.json"),
        ("step_times_8b_tp1.json", "throughput_8b_temperature.json"),
    ],
)
@pytest.mark.parametrize("num_rows", [64, 256])
def test_a_step_alone_is_longer_by_what_its_longer_contexts_take(alone: str, through_grpc: str, num_rows: int) -> None:
    """What the document says of 2.88 and 2.79 ms, from the contexts at which the two were timed."""
    step = read(alone)[f"decode_temperature_{num_rows}"]
    row = read(through_grpc)["rows"][f"decode_b{num_rows}"]
    attention_ms = next(k["us"] for k in step["kernels"] if k["name"] == "_decode_attention") / 1000
    mean_alone = CONTEXT + NUM_WARMUP + (1 + NUM_TIMED) / 2
    mean_profiled = CONTEXT + NUM_WARMUP + NUM_TIMED + (1 + NUM_PROFILED) / 2
    mean_row = DECODE_PROMPT_LEN + (1 + DECODE_STEPS) / 2
    longer_ms = attention_ms * (mean_alone - mean_row) / mean_profiled
    assert step["gpu_ms"] - longer_ms == pytest.approx(row["median"], rel=0.01)
    if (alone, num_rows) == ("step_times_0.6b.json", 64):
        sentence = re.search(r"\*\*A step timed alone.*?(?=\n\n)", TEXT, re.DOTALL)
        assert sentence
        for number in (step["gpu_ms"], row["median"], attention_ms, longer_ms):
            assert f"{number:.2f} ms" in " ".join(sentence[0].split())
        assert (mean_alone - mean_row, mean_profiled) == (33, 706) and "33 tokens more" in sentence[0]
