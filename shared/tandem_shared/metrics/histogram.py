"""A histogram that takes many equal values at once, in plain ints, and that can be sent and added up.

prometheus_client's own takes one value a call, behind a lock, which is too slow for one value a token.
"""

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts of values by bucket, and their sum. Bucket i has the values up to bounds[i] and above the bound before;
    the last bucket, which has no bound, has the rest.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Counts a value `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def add(self, other: "Histogram") -> None:
        """Adds what another histogram of the same bounds has counted. Raises ValueError if the bounds differ."""
        if other.bounds != self.bounds:
            raise ValueError("histograms of different bounds can't be added up")
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def copy(self) -> "Histogram":
        copied = Histogram(self.bounds)
        copied.counts, copied.total = list(self.counts), self.total
        return copied

    @property
    def count(self) -> int:
        return sum(self.counts)
