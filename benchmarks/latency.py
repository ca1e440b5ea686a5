"""Statistics of streams (tandem/latency.py), and of the engine's steps meanwhile."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandem.latency import Stream, percentiles, summarize_streams

SATURATED_SHARE = 0.9


@dataclass(frozen=True)
class LoadSample:
    """The scheduler's load at a time of the same clock."""

    time: float
    num_steps: int
    num_running: int


def saturated_part(samples: Sequence[LoadSample]) -> Sequence[LoadSample]:
    """The samples from the first to the last one with nearly as many running sequences as the most ever."""
    peak = max((sample.num_running for sample in samples), default=0)
    full = [i for i, sample in enumerate(samples) if sample.num_running >= max(1, SATURATED_SHARE * peak)]
    return samples[full[0] : full[-1] + 1] if full else []


def step_seconds(samples: Sequence[LoadSample]) -> float | None:
    """The time of a step: the median over neighbouring samples. None if no step was sampled."""
    times = [
        (after.time - before.time) / (after.num_steps - before.num_steps)
        for before, after in itertools.pairwise(samples)
        if after.num_steps > before.num_steps
    ]
    return float(np.median(times)) if times else None


def summarize(
    streams: Sequence[Stream], samples: Sequence[LoadSample], started: float, slo_ttft_s: float, slo_tpot_s: float
) -> dict[str, Any]:
    """What tandem.latency says of a run, and how gaps compare with the engine's steps while it was saturated."""
    report = summarize_streams(streams, started, slo_ttft_s, slo_tpot_s)
    part = saturated_part(samples)
    step_s = step_seconds(part)
    if step_s is not None:
        gaps = np.concatenate([np.diff(stream.arrivals) for stream in streams])
        gap_ends = np.concatenate([stream.arrivals[1:] for stream in streams])
        inside = (gap_ends >= part[0].time) & (gap_ends <= part[-1].time)
        report["saturated"] = {
            "seconds": round(part[-1].time - part[0].time, 3),
            "step_ms": round(step_s * 1e3, 3),
            "itl_steps": percentiles(gaps[inside] / step_s),
        }
    return report
