"""How long the GPU idles between steps of a steady decode, and what the worker's host does meanwhile.

Usage: python -m benchmarks.gaps MODEL [--depths 1 2 4] [--batches 1 64 256] [--out OUT_JSON]

Depth is max_plans_in_flight. The services are processes, and the worker is one that records the times of its steps
(benchmarks/traced_worker.py). Batches go through the public gRPC API, once to warm up and twice measured. A step counts
if all rows decode in it and it is not near either end of such a stretch. Idle time is measured by the GPU's clock, from
the event after a step's last kernel to the event before the next step's first; on a CPU it is 0. This is all of the
idle time if a step is queued whole before the previous one has ended (queued_ahead_share). Otherwise the GPU also waits
for launches after that event, and this wait is part of gpu_ms.
"""

import argparse
import asyncio
import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import (
    BenchmarkError,
    Engine,
    UnaryClient,
    add_engine_options,
    header,
    running_engine,
    write_json,
)
from benchmarks.traced_worker import TracedStep, read_trace
from benchmarks.workloads import fixed, reduced
from tandem.latency import percentiles

PROMPT_LEN, OUTPUT_LEN = 512, 257
MEASURED_RUNS = 2
MARGIN = 16
"""Steps left out at either end of a stretch."""
SAMPLE_LEN = 6
DURATIONS = ("gpu_duration_ns", "gpu_idle_ns", "grammars_duration_ns")
"""The fields of TracedStep that are no points in time."""

Stretch = list[TracedStep]
"""Steps that follow one another."""


def full_stretches(steps: Iterable[TracedStep], num_rows: int, margin: int, min_len: int) -> list[Stretch]:
    """Stretches in which num_rows rows decode and no prompt is computed, without `margin` steps at either end."""
    groups = itertools.groupby(steps, lambda step: step.num_sampled == num_rows and not step.num_chunk_tokens)
    trimmed = [list(group)[margin:-margin] for is_full, group in groups if is_full]
    return [stretch for stretch in trimmed if len(stretch) >= min_len]


HOST_PARTS: dict[str, Callable[[TracedStep], int]] = {
    "received_to_prepared": lambda step: step.prepared_ns - step.received_ns,
    "begun_to_prepared": lambda step: step.prepared_ns - step.begun_ns,
    "prepared_to_queued": lambda step: step.queued_ns - step.prepared_ns,
    "prepared_to_sampled": lambda step: step.sampled_ns - step.prepared_ns,
    "sampled_to_sent": lambda step: step.sent_ns - step.sampled_ns,
}


def summarize(stretches: list[Stretch], depth: int) -> dict[str, Any]:
    """Percentiles over stretches longer than `depth`. The times of host_us are medians by the worker's clock.
    sent_to_received ends when the plan comes that the result made room for, `depth` steps later, so it is the time of
    both wires and the scheduler.
    """
    steps = [step for stretch in stretches for step in stretch]
    neighbours = pairs(stretches, 1)
    is_ahead = [later.queued_ns < step.sampled_ns for step, later in neighbours]
    host_us = {name: median_us(map(part, steps)) for name, part in HOST_PARTS.items()}
    round_trips = median_us(later.received_ns - step.sent_ns for step, later in pairs(stretches, depth))
    return {
        "num_steps": len(steps),
        "gpu_idle_us": percentiles(step.gpu_idle_ns / 1e3 for step in steps),
        "gpu_ms": percentiles(step.gpu_duration_ns / 1e6 for step in steps),
        "interval_ms": percentiles((later.sampled_ns - step.sampled_ns) / 1e6 for step, later in neighbours),
        "queued_ahead_share": round(statistics.fmean(is_ahead), 4),
        "host_us": host_us | {"sent_to_received": round_trips},
    }


def pairs(stretches: list[Stretch], distance: int) -> list[tuple[TracedStep, TracedStep]]:
    """Each step with the one that comes `distance` steps later."""
    return [pair for stretch in stretches for pair in zip(stretch, stretch[distance:], strict=False)]


def median_us(nanoseconds: Iterable[int]) -> float:
    return round(statistics.median(nanoseconds) / 1e3, 1)


def sample_of(stretch: Stretch) -> list[dict[str, float]]:
    """SAMPLE_LEN steps from the middle of a stretch, in microseconds since the first plan was received."""
    start = max(0, (len(stretch) - SAMPLE_LEN) // 2)
    steps = stretch[start : start + SAMPLE_LEN]
    return [_in_microseconds(step, steps[0].received_ns) for step in steps]


def _in_microseconds(step: TracedStep, origin_ns: int) -> dict[str, float]:
    nanoseconds = {name: value for name, value in dataclasses.asdict(step).items() if name.endswith("_ns")}
    return {
        name.removesuffix("_ns") + "_us": (value - (0 if name in DURATIONS else origin_ns)) / 1e3
        for name, value in nanoseconds.items()
    }


async def decode(engine: Engine, num_rows: int, arguments: argparse.Namespace) -> range:
    """Runs a batch of num_rows rows. Returns the ids of the measured runs' steps."""
    prompt_len, output_len = reduced(PROMPT_LEN, arguments.scale), 1 + reduced(OUTPUT_LEN - 1, arguments.scale)
    async with UnaryClient(engine.services.address, arguments.connections, arguments.sampling) as client:
        await client.seconds(fixed(num_rows, prompt_len, output_len, 1, engine.vocab_size))
        first = engine.counters()["num_steps"] + 1
        for run in range(MEASURED_RUNS):
            await client.seconds(fixed(num_rows, prompt_len, output_len, 2 + run, engine.vocab_size))
    return range(first, engine.counters()["num_steps"] + 1)


def measure(arguments: argparse.Namespace, depth: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs services with `depth` plans in flight. Returns their description, and a case for each batch size."""
    settings = [*arguments.set, ("max_plans_in_flight", depth)]
    at_depth = argparse.Namespace(**vars(arguments) | {"set": settings})
    batches = [reduced(batch, arguments.scale) for batch in arguments.batches]
    with tempfile.TemporaryDirectory(prefix="tandem-trace-") as folder:
        trace = Path(folder) / "steps.jsonl"
        with running_engine(at_depth, ("benchmarks.traced_worker", str(trace))) as engine:
            step_ids = [asyncio.run(decode(engine, batch, arguments)) for batch in batches]
        steps = read_trace(trace)
    cases = []
    for batch, ids in zip(batches, step_ids, strict=True):
        measured = [step for step in steps if step.step_id in ids]
        stretches = full_stretches(measured, batch, reduced(MARGIN, arguments.scale), depth + 1)
        if not stretches:
            raise BenchmarkError(f"depth {depth}, batch {batch}: too few steps in which all rows decode")
        case = {"depth": depth, "batch": batch, **summarize(stretches, depth), "sample": sample_of(stretches[-1])}
        cases.append(case)
    return engine.description, cases


COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "steps": ("", lambda case: case["num_steps"]),
    "idle p50": ("us", lambda case: case["gpu_idle_us"]["p50"]),
    "p90": ("us", lambda case: case["gpu_idle_us"]["p90"]),
    "p99": ("us", lambda case: case["gpu_idle_us"]["p99"]),
    "ahead": ("share", lambda case: case["queued_ahead_share"]),
    "gpu": ("ms", lambda case: case["gpu_ms"]["p50"]),
    "interval": ("ms", lambda case: case["interval_ms"]["p50"]),
    "prepare": ("us", lambda case: case["host_us"]["received_to_prepared"]),
    "launch": ("us", lambda case: case["host_us"]["prepared_to_queued"]),
    "to sampled": ("us", lambda case: case["host_us"]["prepared_to_sampled"]),
    "to sent": ("us", lambda case: case["host_us"]["sampled_to_sent"]),
    "to plan": ("us", lambda case: case["host_us"]["sent_to_received"]),
}
DIGITS = {"": 0, "share": 2, "us": 1, "ms": 3}


def table(report: dict[str, Any]) -> str:
    """A table with a line for each case. Times are medians, except p90 and p99 of the idle time."""
    lines = [
        f"{'depth':>5}{'batch':>6}" + "".join(f"{name:>11}" for name in COLUMNS),
        " " * 11 + "".join(f"{unit:>11}" for unit, _ in COLUMNS.values()),
    ]
    for case in report["cases"]:
        texts = [f"{number_of(case):,.{DIGITS[unit]}f}" for unit, number_of in COLUMNS.values()]
        lines.append(f"{case['depth']:>5}{case['batch']:>6}" + "".join(f"{text:>11}" for text in texts))
    return "\n".join(line.rstrip() for line in lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4], help="plans in flight")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256], help="sequences at once")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(command_line)
    report = header("steps of a steady decode, traced in the worker", arguments.commit)
    cases: list[dict[str, Any]] = []
    for depth in arguments.depths:
        description, at_depth = measure(arguments, depth)
        cases += at_depth
        report |= description | {"settings": dict(arguments.set)}
        print(f"depth {depth}: {description}", flush=True)
    report |= {name: getattr(arguments, name) for name in ("sampling", "scale", "connections")}
    report["cases"] = cases
    if arguments.out:
        write_json(arguments.out, report)
    print(f"{report['model']} on {report['device']}, sampling {report['sampling']}, scale 1/{report['scale']}")
    print(table(report))


if __name__ == "__main__":
    main()
