"""How evenly streams that run at once are served, computed from the arrival times of their tokens."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Arrivals = Sequence[tuple[float, int]]
"""For each message with tokens: when it came (seconds, ascending), and how many tokens it had."""


@dataclass(frozen=True)
class Fairness:
    """Measured over the window in which all streams run: from the latest first token to the earliest last token."""

    window_s: float
    jain: float
    """Jain's index of the tokens that each stream got: 1 where all got the same, 1 / n where one got all."""
    median_gap_s: float
    """The median of all gaps between a message with tokens and the next one of the same stream."""
    longest_gap_s: float
    tokens_per_message: float


def fairness(streams: Sequence[Arrivals]) -> Fairness:
    """Raises ValueError if no stream got two messages while all streams ran."""
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
    """Jain's index: 1 if all shares are equal, 1 / n if one has all. Raises ValueError if all shares are 0."""
    squares = sum(share * share for share in shares)
    if not squares:
        raise ValueError("nobody got anything")
    return sum(shares) ** 2 / (len(shares) * squares)
