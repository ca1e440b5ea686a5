"""An event loop whose clock jumps to the next timer, so that hours pass in seconds and nothing depends on the machine.

Code on it must not wait for a file, a socket or a thread, since the loop never polls them.
"""

import asyncio
import contextlib
import selectors
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar
from unittest.mock import patch

from tandem_scheduler.engine import step_loop
from tandem_scheduler.front_end import front_end
from tandem_scheduler.front_end.grpc_api import inference_servicer, request_codec
from tandem_scheduler.observers import metrics, traces

T = TypeVar("T")


class NothingCanHappen(Exception):
    """Raised when every task waits and no timer is set."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time() starts at 0 and moves only while every task waits."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds


class _Jump(selectors.SelectSelector):
    """The selector, which the loop calls to wait for its next timer. Jumps to it."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise NothingCanHappen
        self._loop.jump(max(timeout, 0.0))
        return []


class _Clock:
    """Stands in for the time module in modules that use its clock."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()

    @staticmethod
    def monotonic_ns() -> int:
        return round(1e9 * _Clock.monotonic())

    time_ns = monotonic_ns


@contextlib.contextmanager
def _virtual_modules() -> Iterator[None]:
    """Gives virtual time to the modules under simulation that import the time module."""
    with contextlib.ExitStack() as stack:
        for module in (step_loop, request_codec, front_end, inference_servicer, metrics, traces):
            stack.enter_context(patch.object(module, "time", _Clock))
        yield


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run() in virtual time."""
    with _virtual_modules(), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
