"""LoopThread: a coroutine's result comes to the thread that asked, and closing works from any thread."""

import asyncio
import threading

import pytest

from tandem.loop_thread import LoopThread


async def nothing() -> None:
    pass


def test_results_and_errors_come_back() -> None:
    async def fail() -> None:
        raise KeyError("x")

    loop = LoopThread()
    assert loop.run(asyncio.sleep(0, 5)) == 5
    with pytest.raises(KeyError):
        loop.run(fail())
    assert "tandem-calls" in {thread.name for thread in threading.enumerate()}
    loop.close(nothing())
    assert "tandem-calls" not in {thread.name for thread in threading.enumerate()}


def test_it_can_be_closed_in_its_own_thread() -> None:
    loop = LoopThread()

    async def close() -> None:
        loop.close(nothing())

    loop.run(close())
    [*threads] = (thread for thread in threading.enumerate() if thread.name == "tandem-calls")
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
