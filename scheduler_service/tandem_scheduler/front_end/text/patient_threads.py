"""Threads that calls wait for in the event loop, not in an executor's queue, which holds what is cancelled until its
turn comes. Knows nothing of what they run.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class PatientThreads:
    """A call that is cancelled while it waits never reaches a thread, and nothing of it stays. One that runs keeps its
    thread until it ends, cancelled or not.
    """

    def __init__(self, count: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._free = asyncio.Semaphore(count)

    async def start(self, function: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        """Waits for a free thread and starts the call there. The future is done when the thread is free again, unless
        it is cancelled, so it is to be awaited through asyncio.shield().
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
