"""Statistics of streams as their clients saw them, computed from the times of requests and messages."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common import percentiles

SATURATED_SHARE = 0.9


@dataclass(frozen=True)
class Stream:
    """One request. Times are seconds of one clock; messages without tokens are not among the arrivals."""

    scheduled: float
    sent: float
    arrivals: np.ndarray  # (messages,)
    num_tokens: np.ndarray  # (messages,)
    ended: float

    @property
    def ttft(self) -> float:
        """Seconds from the time at which the request was due, so that a client that sends late hides no delay."""
        return float(self.arrivals[0] - self.scheduled)

    @property
    def tpot(self) -> float:
        """Mean seconds of a token after those of the first message; 0 if there are none."""
        later = int(self.num_tokens[1:].sum())
        return float(self.arrivals[-1] - self.arrivals[0]) / later if later else 0.0


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
    """The statistics of a run: latencies in milliseconds, and rates per second since `started`. An itl is the gap
    between two messages of a stream, however many tokens the second one holds.
    """
    elapsed = max(stream.ended for stream in streams) - started
    gaps = np.concatenate([np.diff(stream.arrivals) for stream in streams])
    gap_ends = np.concatenate([stream.arrivals[1:] for stream in streams])
    num_tokens = np.concatenate([stream.num_tokens for stream in streams])
    num_good = sum(stream.ttft <= slo_ttft_s and stream.tpot <= slo_tpot_s for stream in streams)
    counts = Counter(num_tokens.tolist())
    part = saturated_part(samples)
    step_s = step_seconds(part)
    report: dict[str, Any] = {
        "elapsed_s": round(elapsed, 3),
        "output_tok_s": round(float(num_tokens.sum()) / elapsed, 1),
        "requests_s": round(len(streams) / elapsed, 3),
        "goodput": {"share": round(num_good / len(streams), 4), "requests_s": round(num_good / elapsed, 3)},
        "ttft_ms": percentiles(1e3 * stream.ttft for stream in streams),
        "tpot_ms": percentiles(1e3 * stream.tpot for stream in streams),
        "itl_ms": percentiles(gaps * 1e3),
        "e2e_ms": percentiles(1e3 * (stream.ended - stream.scheduled) for stream in streams),
        "lateness_ms": percentiles(1e3 * (stream.sent - stream.scheduled) for stream in streams),
        "tokens_per_message": {
            "mean": round(float(num_tokens.mean()), 4),
            "shares": {str(size): round(count / len(num_tokens), 5) for size, count in sorted(counts.items())},
        },
    }
    if step_s is not None:
        inside = (gap_ends >= part[0].time) & (gap_ends <= part[-1].time)
        report["saturated"] = {
            "seconds": round(part[-1].time - part[0].time, 3),
            "step_ms": round(step_s * 1e3, 3),
            "itl_steps": percentiles(gaps[inside] / step_s),
        }
    return report
