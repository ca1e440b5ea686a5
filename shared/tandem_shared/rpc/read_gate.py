"""How many requests are read at once, and for how long one may take to arrive.

Before gRPC is asked for a call's message, the client can send no more of it than a stream's initial window, 64 KiB as
server_options() has it. Once asked, gRPC lets the whole message in, and holds what has come of it. So the number of
requests being read bounds the memory that half-sent requests hold. A message within the initial window is there already
and is read at once.

A request that does not arrive ends its call: after READ_TIMEOUT_S, waiting for its turn included, and after
HURRIED_READ_S where others need its turn or its place. So clients that stall hold others up for seconds at most.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

from tandem_shared.errors import RequestTooSlow

READ_TIMEOUT_S = 30.0
"""A request of 4 MiB takes as long at 1.1 Mbit/s."""

HURRIED_READ_S = 2.0


class ReadGate:
    """All reads of a server, or of some of its services."""

    def __init__(self, max_reading: int = sys.maxsize, max_reading_per_connection: int = sys.maxsize) -> None:
        self._max_per_connection = max_reading_per_connection
        self._turns = _Turns(max_reading)
        # A connection's turns live as long as calls of it wait or read.
        self._turns_by_peer: WeakValueDictionary[str, _Turns] = WeakValueDictionary()
        self._unread = _Deadlines()

    async def read(self, peer: str, requests: AsyncIterator[bytes]) -> bytes | None:
        """The next message of a call, None where there is none. RequestTooSlow where it does not arrive in time."""
        turns = self._turns_by_peer.setdefault(peer, _Turns(self._max_per_connection))
        try:
            async with asyncio.timeout(READ_TIMEOUT_S) as deadline:
                with self._unread.listing(deadline):
                    async with turns.next(), self._turns.next():
                        with turns.reading(deadline), self._turns.reading(deadline):
                            return await anext(requests, None)
        except TimeoutError:
            raise RequestTooSlow(
                f"the request did not arrive within {READ_TIMEOUT_S:g} s, or {HURRIED_READ_S:g} s while others waited"
            ) from None

    def hurry_oldest(self) -> None:
        """For whoever found no place: the call that has been unread for longest gives up its own."""
        self._unread.hurry_oldest()


class _Deadlines:
    """The deadlines of calls that nobody has hurried yet, oldest first."""

    def __init__(self) -> None:
        self._hurried_ends: dict[asyncio.Timeout, float] = {}

    @contextmanager
    def listing(self, deadline: asyncio.Timeout) -> Iterator[None]:
        self._hurried_ends[deadline] = asyncio.get_running_loop().time() + HURRIED_READ_S
        try:
            yield
        finally:
            self._hurried_ends.pop(deadline, None)

    def hurry_oldest(self) -> None:
        for deadline, hurried_end in self._hurried_ends.items():
            del self._hurried_ends[deadline]
            end = deadline.when()
            if not deadline.expired() and end is not None and end > hurried_end:
                deadline.reschedule(hurried_end)
            return


class _Turns:
    """So many reads at once; those that wait have their turns in order, and hurry as many of those that read."""

    def __init__(self, count: int) -> None:
        self._semaphore = asyncio.Semaphore(count)
        self._num_waiting = 0
        self._reading = _Deadlines()

    @asynccontextmanager
    async def next(self) -> AsyncIterator[None]:
        if self._semaphore.locked():
            self._reading.hurry_oldest()
        self._num_waiting += 1
        try:
            await self._semaphore.acquire()
        finally:
            self._num_waiting -= 1
        try:
            yield
        finally:
            self._semaphore.release()

    @contextmanager
    def reading(self, deadline: asyncio.Timeout) -> Iterator[None]:
        with self._reading.listing(deadline):
            if self._num_waiting:
                self._reading.hurry_oldest()
            yield
