"""The measurement of what a scheduler carries, at a small scale."""

import json
from pathlib import Path

import pytest

from benchmarks import capacity
from benchmarks.common import BenchmarkError
from tandem.commands.load.clients import Run
from tandem.commands.load.workload import Ask
from tandem.latency import Stream

SMALL = (
    "--step-ms 2 --front-ends 0 1 --streams 2 4 --few-streams 4 --http-streams 4 --num-requests 8 --clients 2 "
    "--prompts ids:16:4 chat:8:4 --rates 8 --rate-s 1 --commit abc"
)


@pytest.mark.slow
def test_it_runs_at_a_small_scale(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    capacity.main([*SMALL.split(), "--out", str(out)])
    report = json.loads(out.read_text())
    points = [(row["api"], row["front_ends"], row["num_streams"]) for row in report["streams"]]
    assert points == [("gRPC", 0, 2), ("gRPC", 0, 4), ("gRPC", 1, 4), ("HTTP", 0, 4)]
    for row in report["streams"]:
        assert 0 < row["output_tok_s"] <= row["most_tok_s"] == row["num_streams"] / 0.002
        # Each stream gets at most a token a step, and there are two rounds or more of them.
        assert row["num_steps"] >= 8 / row["num_streams"] * capacity.OUTPUT_LEN
        for role, cost in row["cpu_us_per_token"].items():
            assert cost == pytest.approx(row["cpu_us_per_step"][role] * row["num_steps"] / 1024, abs=1)
        assert (row["cpus"]["front_ends"] > 0) == (row["front_ends"] > 0)
        assert (row["cpus"].get("gateway", 0) > 0) == (row["api"] == "HTTP")
    assert [(row["kind"], row["length"], row["num_requests"]) for row in report["prompts"]] == [
        ("ids", 16, 4), ("chat", 8, 4)
    ]  # fmt: skip
    assert [(row["rate"], row["num_requests"]) for row in report["rates"]] == [(8, 8)]
    overload = report["overload"]
    # As many as run and wait are answered, and whoever came when some of these had ended.
    assert overload["num_answered"] >= 128
    assert overload["num_answered"] + sum(overload["refused"].values()) == overload["num_requests"] == 512
    assert list(overload["refused"]) == ["RESOURCE_EXHAUSTED"]


@pytest.mark.parametrize("counts", [[[4, 4]], [[4, 4], [4, 3]], [[4, 4], [4, 5]], [[4, 4], [4, 4], [4, 4]]])
def test_lost_and_repeated_tokens_and_streams_are_noticed(counts: list[list[int]]) -> None:
    asks = [Ask([1], 8, 0.6, seed, 0.0) for seed in range(2)]
    good = Run(0.0, [Stream(0, 0, [1, 2], [4, 4], 3)] * 2)
    capacity.check_tokens(good, asks, 2)
    bad = Run(0.0, [Stream(0, 0, [1, 2], each, 3) for each in counts])
    with pytest.raises(BenchmarkError):
        capacity.check_tokens(bad, asks, 2)
