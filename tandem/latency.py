"""Statistics of streams as their clients saw them, computed from the times of requests and messages."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stream:
    """One request. Times are seconds of one clock; messages without tokens are not among the arrivals."""

    scheduled: float
    sent: float
    arrivals: Sequence[float]  # (messages,)
    num_tokens: Sequence[int]  # (messages,)
    ended: float

    @property
    def ttft(self) -> float:
        """Seconds from the time at which the request was due, so that a client that sends late hides no delay."""
        return float(self.arrivals[0] - self.scheduled)

    @property
    def tpot(self) -> float:
        """Mean seconds of a token after those of the first message; 0 if there are none."""
        later = int(sum(self.num_tokens[1:]))
        return float(self.arrivals[-1] - self.arrivals[0]) / later if later else 0.0


def percentiles(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """The 50th, 90th and 99th percentile, between neighbours by linear interpolation; empty without values."""
    ordered = sorted(map(float, values))
    if not ordered:
        return {}
    found = {}
    for q in (50, 90, 99):
        below, share = divmod((len(ordered) - 1) * q, 100)
        above = min(below + 1, len(ordered) - 1)
        found[f"p{q}"] = round(ordered[below] + (ordered[above] - ordered[below]) * share / 100, digits)
    return found


def summarize_streams(
    streams: Sequence[Stream], started: float, slo_ttft_s: float, slo_tpot_s: float
) -> dict[str, Any]:
    """The statistics of a run: latencies in milliseconds, and rates per second since `started`. An itl is the gap
    between two messages of a stream, however many tokens the second one holds.
    """
    elapsed = max(stream.ended for stream in streams) - started
    gaps = [after - before for stream in streams for before, after in itertools.pairwise(stream.arrivals)]
    counts = Counter(int(number) for stream in streams for number in stream.num_tokens)
    num_messages, num_tokens = counts.total(), sum(size * count for size, count in counts.items())
    num_good = sum(stream.ttft <= slo_ttft_s and stream.tpot <= slo_tpot_s for stream in streams)
    return {
        "elapsed_s": round(elapsed, 3),
        "output_tok_s": round(num_tokens / elapsed, 1),
        "requests_s": round(len(streams) / elapsed, 3),
        "goodput": {"share": round(num_good / len(streams), 4), "requests_s": round(num_good / elapsed, 3)},
        "ttft_ms": percentiles(1e3 * stream.ttft for stream in streams),
        "tpot_ms": percentiles(1e3 * stream.tpot for stream in streams),
        "itl_ms": percentiles(gap * 1e3 for gap in gaps),
        "e2e_ms": percentiles(1e3 * (stream.ended - stream.scheduled) for stream in streams),
        "lateness_ms": percentiles(1e3 * (stream.sent - stream.scheduled) for stream in streams),
        "tokens_per_message": {
            "mean": round(num_tokens / num_messages, 4),
            "shares": {str(size): round(count / num_messages, 5) for size, count in sorted(counts.items())},
        },
    }
