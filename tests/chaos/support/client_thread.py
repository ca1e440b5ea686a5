"""An event loop in a thread of its own, with clients that run until each has the answer that it waits for."""

import asyncio
import threading
from collections.abc import Coroutine, Iterable
from typing import Any


class ClientThread:
    """The base of loads. A subclass opens and closes its connections, and runs a client until `_is_last`."""

    def __init__(self) -> None:
        self._is_last = False
        """Whether each client is to end with its next answer."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._clients: list[asyncio.Task[None]] = []

    def __exit__(self, *_: object) -> None:
        self._is_last = True
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def finish(self, timeout_s: float = 600.0) -> None:
        """Lets each client get the answer that it waits for. No more requests are sent then."""
        self._is_last = True

        async def wait() -> None:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*self._clients)

        self._run(wait())

    def _start(self, numbers: Iterable[int]) -> None:
        """Starts the clients of these numbers."""

        async def start() -> None:
            self._clients = [asyncio.create_task(self._run_client(number)) for number in numbers]

        self._run(start())

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _end(self) -> None:
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await self._close()

    async def _run_client(self, number: int) -> None:
        """Asks again and again, until `_is_last`."""
        raise NotImplementedError

    async def _close(self) -> None:
        """Closes the connections."""
        raise NotImplementedError
