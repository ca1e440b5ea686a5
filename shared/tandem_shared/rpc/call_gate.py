"""Bounds how many calls may be open at once, in all and for each connection, so that one client can't take every place.

The first num_unshared places are for any connection. Beyond those, a connection may have as many calls open as there
are places left. So a single connection gets half of the places, or num_unshared if that is more. When calls end and new
ones are opened, k connections get 1 / (k + 1) of the places each, and as many are left for the next connection.
Connections that come one after the other and never end a call get a half, a quarter and so on, so it takes about log2
of the number of places of them to take all. Then a call whose request has not arrived yet gives up its place
(read_gate.py); a call whose request has arrived keeps it.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tandem_shared.errors import QueueFull


class CallGate:
    """The places of one server, or of some of its services."""

    def __init__(
        self, max_open_calls: int = sys.maxsize, *, num_unshared: int = 0, max_per_connection: int = sys.maxsize
    ) -> None:
        """max_open_calls: the number of places. num_unshared: how many of them any connection may take."""
        self._max_open_calls = max_open_calls
        self._num_unshared = num_unshared
        self._max_per_connection = max_per_connection
        self._num_open = 0
        self._num_open_by_peer: Counter[str] = Counter()

    @contextmanager
    def pass_through(self, peer: str, if_full: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Holds a place for a call of the connection `peer` while it runs. Raises QueueFull if the connection has its
        share, or no place is left; in the latter case, if_full is called first.
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
