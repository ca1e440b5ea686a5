"""Threads for which calls wait in the event loop, and not in an executor's queue, which keeps a cancelled call until
its turn comes. Knows nothing of the functions that they run.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class PatientThreads:
    """A call that is cancelled while it waits never reaches a thread, and nothing of it stays in memory. A call that
    runs keeps its thread until it ends, cancelled or not.
    """

    def __init__(self, count: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._free = asyncio.Semaphore(count)

    async def start(self, function: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        """Waits for a free thread and starts the call there. The future is done when the thread is free again. Await it
        through asyncio.shield(), so that a cancelled caller does not cancel it.
        """
        await self._free.acquire()
        try:
            future = asyncio.get_running_loop().run_in_executor(self._executor, function, *args)
        except BaseException:
            self._free.release()
            raise
        future.add_done_callback(lambda _: self._free.release())
        return future

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.shield(await self.start(function, *args))
