"""What a load generator needs of a server, whichever API it speaks."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from tandem.commands.load.workload import Ask


class RequestFailed(Exception):
    """A server did not answer a request, or ended its answer early."""


@dataclass(frozen=True)
class Received:
    """An answer as it came, not yet parsed: parsing waits until all answers have come."""

    sent: float
    times: list[float]
    """When each of the parts came, in seconds of time.monotonic()."""
    parts: list[bytes]


class Connection(Protocol):
    """A client process's connection to the server."""

    async def stream(self, request: bytes) -> Received:
        """Sends an encoded request and reads the whole answer. Raises RequestFailed."""
        ...


class Target(Protocol):
    """A server. It is sent to the client processes, so it can be pickled."""

    def connect(self) -> AbstractAsyncContextManager[Connection]: ...

    def encode(self, ask: Ask) -> bytes: ...

    def parse(self, received: Received) -> tuple[list[float], list[int]]:
        """When messages with tokens came, and how many tokens each had. Raises RequestFailed."""
        ...

    def description(self) -> dict[str, Any]:
        """What is measured, for the report."""
        ...
