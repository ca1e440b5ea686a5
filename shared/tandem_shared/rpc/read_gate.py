"""Bounds how many requests are read at once, and how long a request may take to arrive.

Until gRPC is asked for a call's message, the client can send no more of it than a stream's initial window, 64 KiB with
server_options(). Once asked, gRPC lets the whole message in and stores what has arrived. So the number of requests
being read bounds the memory that half-sent requests take. A message within the initial window has arrived already, and
is read at once.

A call whose request does not arrive ends: after READ_TIMEOUT_S, with the time it waited for its turn, or after
HURRIED_READ_S if other calls need its turn or its place. So clients that stall delay others by seconds at most.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

from tandem_shared.errors import RequestTooSlow

READ_TIMEOUT_S = 30.0
"""The time in which a request of 4 MiB arrives at 1.1 Mbit/s."""

HURRIED_READ_S = 2.0


class ReadGate:
    """The requests that a server, or some of its services, read."""

    def __init__(self, max_reading: int = sys.maxsize, max_reading_per_connection: int = sys.maxsize) -> None:
        self._max_per_connection = max_reading_per_connection
        self._turns = _Turns(max_reading)
        # An entry lives as long as calls of the connection wait or read.
        self._turns_by_peer: WeakValueDictionary[str, _Turns] = WeakValueDictionary()
        self._unread = _Deadlines()

    async def read(self, peer: str, requests: AsyncIterator[bytes]) -> bytes | None:
        """The next message of a call of the connection `peer`, None at the end of a stream. Raises RequestTooSlow if it
        does not arrive in time.
        """
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
        """Called when a call finds no place: the call whose request has been missing for longest must hurry."""
        self._unread.hurry_oldest()


class _Deadlines:
    """The deadlines of calls that have not been told to hurry yet, oldest first."""

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
    """Lets `count` calls read at once. Others wait for their turns in order, and for each that waits, one that reads
    must hurry.
    """

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
