"""benchmarks.gaps: its arithmetic, a run on a CPU, and the picture of its samples."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gaps, plot, timeline
from benchmarks.traced_worker import TracedStep
from tests.unit.benchmarks.test_benchmarks import H100, common_flags

MS = 1_000_000
US = 1_000
START_NS = 10**18


def step(step_id: int, num_sampled: int = 4, num_chunk_tokens: int = 0) -> TracedStep:
    """A step of a worker that gets a plan every 2 ms. In these the GPU idles for 5 us and computes for the rest."""
    received_ns = START_NS + step_id * 2 * MS
    return TracedStep(
        step_id=step_id,
        num_chunk_tokens=num_chunk_tokens,
        num_sampled=num_sampled,
        received_ns=received_ns,
        begun_ns=received_ns + 10 * US,
        prepared_ns=received_ns + 40 * US,
        queued_ns=received_ns + 140 * US,
        sampled_ns=received_ns + 3500 * US,
        sent_ns=received_ns + 3520 * US,
        gpu_duration_ns=1995 * US,
        gpu_idle_ns=5 * US,
        grammars_duration_ns=0,
    )


def test_stretches_are_where_all_rows_decode() -> None:
    sampled = [1, 4, 4, 4, 4, 4, 3, 4, 4, 4, 4, 4, 4, 4, 1]
    chunks = [8, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0]
    steps = [step(i, *numbers) for i, numbers in enumerate(zip(sampled, chunks, strict=True))]

    def ids(margin: int, min_len: int) -> list[list[int]]:
        return [[s.step_id for s in stretch] for stretch in gaps.full_stretches(steps, 4, margin, min_len)]

    assert ids(1, 1) == [[3, 4], [8, 9]]
    assert ids(1, 3) == []
    assert gaps.full_stretches(steps, 5, 1, 1) == []


def test_a_summary_of_even_steps() -> None:
    stretches = [[step(i) for i in range(10)], [step(i) for i in range(20, 25)]]
    even = ("p50", "p90", "p99")
    assert gaps.summarize(stretches, depth=2) == {
        "num_steps": 15,
        "gpu_idle_us": dict.fromkeys(even, 5.0),
        "gpu_ms": dict.fromkeys(even, 1.995),
        # The time between the last step of one stretch and the first of the next one does not count.
        "interval_ms": dict.fromkeys(even, 2.0),
        "queued_ahead_share": 1.0,
        "host_us": {
            "received_to_prepared": 40.0,
            "begun_to_prepared": 30.0,
            "prepared_to_queued": 100.0,
            "prepared_to_sampled": 3460.0,
            "sampled_to_sent": 20.0,
            "sent_to_received": 480.0,
        },
    }


def test_steps_that_are_queued_late_are_counted() -> None:
    steps = [step(i) for i in range(5)]
    steps[2] = dataclasses.replace(steps[2], queued_ns=steps[1].sampled_ns + 1)
    assert gaps.summarize([steps], depth=1)["queued_ahead_share"] == 0.75


def test_a_sample_is_of_the_middle_and_begins_at_0() -> None:
    sample = gaps.sample_of([step(i) for i in range(gaps.SAMPLE_LEN + 10)])
    assert [entry["received_us"] for entry in sample] == [2000.0 * i for i in range(gaps.SAMPLE_LEN)]
    assert sample[1]["sent_us"] == 5520.0 and sample[1]["gpu_duration_us"] == 1995.0 and sample[1]["gpu_idle_us"] == 5.0
    assert len(gaps.sample_of([step(0), step(1)])) == 2


def test_steps_on_the_gpu_are_placed_by_its_own_clock() -> None:
    steps = [step(i) for i in range(4)]
    # The host reads all results late, except the third.
    steps = [dataclasses.replace(s, sampled_ns=s.sampled_ns + (0 if s.step_id == 2 else 70 * US)) for s in steps]
    spans = timeline.gpu_spans(gaps.sample_of(steps))
    assert spans[2][1] == pytest.approx(2 * 2000 + 3500)
    for start, end in spans:
        assert end - start == pytest.approx(1995)
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert start - end == pytest.approx(5)


def gaps_report(**changes: Any) -> dict[str, Any]:
    sample = gaps.sample_of([step(i) for i in range(gaps.SAMPLE_LEN)])
    cases = [{"depth": depth, "batch": batch, "sample": sample} for depth in (1, 2) for batch in (1, 64)]
    return {"model": "0.6b", "device": H100, "date": "2026-01-01", "cases": cases} | changes


def test_the_timeline_is_of_the_newest_results_on_a_gpu_and_is_deterministic(tmp_path: Path) -> None:
    reports = {
        "gaps_a": gaps_report(date="2026-01-02", device="another"),
        "gaps_b": gaps_report(),
        "gaps_c": gaps_report(model="8b"),
        "gaps_d": gaps_report(model="embedded", device="cpu"),
        "gaps_e": gaps_report(model="1.7b", cases=[]),
    }
    for name, report in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    assert list(timeline.load_samples(tmp_path)) == ["0.6b on another", f"8b on {H100}"]
    for images in ("one", "two"):
        plot.main(tmp_path, tmp_path / images)
    assert (tmp_path / "one" / "timeline.svg").read_bytes() == (tmp_path / "two" / "timeline.svg").read_bytes()
    assert not (tmp_path / "one" / "throughput.svg").exists()


@pytest.mark.slow
def test_gaps_are_measured_at_each_depth_and_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    gaps.main(["embedded", *common_flags(16), "--depths", "1", "2", "--batches", "1", "64", "--out", str(out)])
    report = json.loads(out.read_text())
    assert (report["commit"], report["device"], report["model"]) == ("abc", "cpu", "embedded")
    assert report["settings"] == {"num_threads": 1}
    assert [(case["depth"], case["batch"]) for case in report["cases"]] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    for case in report["cases"]:
        assert case["gpu_idle_us"]["p99"] == case["gpu_ms"]["p50"] == 0
        assert case["interval_ms"]["p50"] > 0 and min(case["host_us"].values()) > 0
        times = ("received_us", "begun_us", "prepared_us", "queued_us", "sampled_us", "sent_us")
        for entry in case["sample"]:
            assert [entry[name] for name in times] == sorted(entry[name] for name in times)
    # In each of two runs 16 steps only decode, and one at either end is left out.
    assert [case["num_steps"] for case in report["cases"] if case["batch"] == 1] == [28, 28]
    # A plan waits for the result that makes room for it.
    assert report["cases"][0]["queued_ahead_share"] == 0
    assert gaps.table(report) in capsys.readouterr().out
