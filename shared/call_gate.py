"""How many calls may be open at once, and how many of them one connection may have.

A connection may have as many calls open as places are left. So one connection alone gets half of the places; with k
greedy connections each gets 1 / (k + 1) of them, and as much is left for whoever comes next.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import QueueFull


class CallGate:
    def __init__(self, max_open_calls: int = sys.maxsize) -> None:
        self._max_open_calls = max_open_calls
        self._num_open = 0
        self._num_open_by_peer: Counter[str] = Counter()

    @contextmanager
    def pass_through(self, peer: str) -> Iterator[None]:
        """Holds a place for a call of a connection while it runs. QueueFull where the connection has its share."""
        if self._num_open_by_peer[peer] >= self._max_open_calls - self._num_open:
            raise QueueFull(
                f"{self._num_open_by_peer[peer]} calls of this connection are open, {self._num_open} in all"
            )
        self._num_open += 1
        self._num_open_by_peer[peer] += 1
        try:
            yield
        finally:
            self._num_open -= 1
            self._num_open_by_peer[peer] -= 1
            if not self._num_open_by_peer[peer]:
                del self._num_open_by_peer[peer]
