"""An event loop in a thread, for synchronous code, which may itself run in an event loop, as in a notebook."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines in one event loop. Threads may share it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tandem-calls", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine. At an interrupt the coroutine is cancelled."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            # Has no effect if it is the coroutine's own error.
            future.cancel()
            raise

    def close(self, last: Coroutine[Any, Any, object]) -> None:
        """Runs a last coroutine, and then ends the thread.

        It may be called in the thread itself, if a finalizer calls it and the garbage is collected there. Then it can't
        wait for the end.
        """
        future = asyncio.run_coroutine_threadsafe(last, self._loop)
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        if threading.current_thread() is not self._thread:
            future.result()
            self._thread.join()
            self._loop.close()
