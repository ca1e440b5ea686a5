"""How many calls may be open at once, and how many of them one connection may have.

The first places are for anybody. Past those, a connection may have as many calls open as places are left. So one
connection alone gets half of the places, or those for anybody where they are more. Of connections whose calls end and
are opened again, k have 1 / (k + 1) of the places each, and as much is left for whoever comes next. Connections that
come one after the other and end no call get a half, a quarter and so on: about log2 of the places of them leave none.
Then a call whose request has not arrived gives up its place, see read_gate.py. A call whose request was taken keeps it.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tandem_shared.errors import QueueFull


class CallGate:
    def __init__(
        self, max_open_calls: int = sys.maxsize, *, num_unshared: int = 0, max_per_connection: int = sys.maxsize
    ) -> None:
        """num_unshared: of the places, those that are for anybody."""
        self._max_open_calls = max_open_calls
        self._num_unshared = num_unshared
        self._max_per_connection = max_per_connection
        self._num_open = 0
        self._num_open_by_peer: Counter[str] = Counter()

    @contextmanager
    def pass_through(self, peer: str, if_full: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Holds a place for a call of a connection while it runs. QueueFull where the connection has its share.
        if_full: called where no place is left for anybody.
        """
        num_own, num_left = self._num_open_by_peer[peer], self._max_open_calls - self._num_open
        is_past_share = num_own >= num_left and self._num_open >= self._num_unshared
        if is_past_share or not num_left or num_own >= self._max_per_connection:
            if not num_left:
                if_full()
            raise QueueFull(f"{num_own} calls of this connection are open, {self._num_open} in all")
        self._num_open += 1
        self._num_open_by_peer[peer] += 1
        try:
            yield
        finally:
            self._num_open -= 1
            self._num_open_by_peer[peer] -= 1
            if not self._num_open_by_peer[peer]:
                del self._num_open_by_peer[peer]
