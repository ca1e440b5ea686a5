"""How evenly streams that run at once are served, of when their tokens came."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Arrivals = Sequence[tuple[float, int]]
"""When each message with tokens came (seconds, ascending), and how many tokens."""


@dataclass(frozen=True)
class Fairness:
    """Over the window in which all streams run: from the last one's first token to the first one's last."""

    window_s: float
    jain: float
    """Jain's index of the tokens that each stream got: 1 where all got the same, 1 / n where one got all."""
    median_gap_s: float
    """Between one message with tokens and the next of the same stream, of all streams' gaps."""
    longest_gap_s: float
    tokens_per_message: float


def fairness(streams: Sequence[Arrivals]) -> Fairness:
    """Raises ValueError where not all of the streams ever ran at once, for two messages at least."""
    begin = max(arrivals[0][0] for arrivals in streams)
    end = min(arrivals[-1][0] for arrivals in streams)
    inside = [[(at, count) for at, count in arrivals if begin <= at <= end] for arrivals in streams]
    gaps = [later - earlier for arrivals in inside for (earlier, _), (later, _) in pairwise(arrivals)]
    if not gaps:
        raise ValueError("the streams did not run at once")
    counts = [[count for at, count in arrivals if at > begin] for arrivals in inside]
    return Fairness(
        window_s=end - begin,
        jain=jain_index([sum(each) for each in counts]),
        median_gap_s=statistics.median(gaps),
        longest_gap_s=max(gaps),
        tokens_per_message=sum(map(sum, counts)) / sum(map(len, counts)),
    )


def jain_index(shares: Sequence[float]) -> float:
    """Raises ValueError where nobody got anything."""
    squares = sum(share * share for share in shares)
    if not squares:
        raise ValueError("nobody got anything")
    return sum(shares) ** 2 / (len(shares) * squares)
