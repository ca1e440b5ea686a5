"""docs/capacity.md against the results file."""

import copy
import json

import pytest

from benchmarks import capacity_tables, summary
from benchmarks.common import RESULTS, Report

TEXT = capacity_tables.DOCUMENT.read_text()


@pytest.fixture
def report() -> Report:
    report: Report = json.loads((RESULTS / capacity_tables.RESULTS_FILE).read_text())
    return report


def test_the_tables_are_those_of_the_results() -> None:
    assert summary.filled(TEXT, RESULTS, capacity_tables.PARTS) == TEXT, "run make bench-plot"


def test_what_a_core_carries_is_the_inverse_of_what_a_token_takes(report: Report) -> None:
    report = copy.deepcopy(report)
    for row in report["streams"]:
        row["cpu_us_per_token"] = {"scheduler": 40, "front_ends": 80, "gateway": 125}
    lines = capacity_tables.cores(report).splitlines()[2:]
    # 256 streams at 10 ms are 25,600 tokens a second.
    assert report["step_ms"] == 10
    assert [line.split(" | ")[1:] for line in lines] == [
        ["40 µs", "25,000", "1.0 |"],
        ["40 µs", "25,000", "1.0 |"],
        ["80 µs", "12,000", "2.0 |"],
        ["125 µs", "8,000", "3.2 |"],
    ]


def test_what_the_document_concludes_is_so(report: Report) -> None:
    def costs(front_ends: int, role: str) -> list[float]:
        return [
            row["cpu_us_per_token"][role]
            for row in report["streams"]
            if row["front_ends"] == front_ends and row["api"] == "gRPC"
        ]

    # Front ends leave the scheduler process little to do, and cost more than it does.
    assert max(costs(1, "scheduler")) < min(costs(0, "scheduler")) / 2
    assert min(costs(1, "front_ends")) > max(costs(1, "scheduler"))
    # Below the capacity a stream gets a token a step; past it gaps and waits grow.
    first, *_, last = (row for row in report["streams"] if row["front_ends"] == 0 and row["api"] == "gRPC")
    assert first["itl_ms"]["p50"] < 1.2 * report["step_ms"] < last["itl_ms"]["p50"]
    assert last["itl_ms"]["p99"] > 2 * first["itl_ms"]["p99"]
    assert last["ttft_ms"]["p50"] > 10 * first["ttft_ms"]["p50"]
    # There is a knee between the first rate and the last.
    waits = [row["ttft_ms"]["p50"] for row in report["rates"]]
    assert waits[-1] > 10 * waits[0]
    overload = report["overload"]
    assert overload["max_num_seqs"] == overload["max_num_waiting"] == 64
    assert list(overload["refused"]) == ["RESOURCE_EXHAUSTED"]
    assert overload["num_answered"] + sum(overload["refused"].values()) == overload["num_requests"]
