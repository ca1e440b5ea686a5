"""Requests that do not arrive: how many are read at once, and when their calls end."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tandem_shared.errors import RequestTooSlow
from tandem_shared.rpc import read_gate
from tandem_shared.rpc.read_gate import ReadGate

LONG_S = 1000.0


async def arrived() -> AsyncIterator[bytes]:
    yield b"request"


class Stalled:
    """Requests that never come; counts the calls whose message was asked for."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def request(self) -> AsyncIterator[bytes]:
        self.num_asked += 1
        await asyncio.Event().wait()
        yield b""


async def start(gate: ReadGate, peer: str, stalled: Stalled, count: int) -> list[asyncio.Task[bytes | None]]:
    tasks = [asyncio.create_task(gate.read(peer, stalled.request())) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def cancel(tasks: list[asyncio.Task[bytes | None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_request_that_does_not_come_ends_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_gate, "READ_TIMEOUT_S", 0.01)
    stalled = Stalled()
    # The second waits for its turn in vain, which is no longer.
    results = await asyncio.gather(*await start(ReadGate(1), "a", stalled, 2), return_exceptions=True)
    assert [type(result) for result in results] == [RequestTooSlow] * 2


async def test_messages_asked_for_at_once_are_bounded_in_all_and_for_each_connection() -> None:
    gate = ReadGate(max_reading=5, max_reading_per_connection=2)
    stalled = [Stalled() for _ in range(4)]
    tasks = [task for index, each in enumerate(stalled) for task in await start(gate, str(index), each, 10)]
    assert [each.num_asked for each in stalled] == [2, 2, 1, 0]
    await cancel(tasks)


async def test_a_connections_stalled_requests_do_not_hold_up_another_connection() -> None:
    gate = ReadGate(max_reading=3, max_reading_per_connection=2)
    tasks = await start(gate, "a", Stalled(), 10)
    assert await asyncio.wait_for(gate.read("b", arrived()), 1) == b"request"
    await cancel(tasks)


async def test_whoever_waits_hurries_those_that_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_gate, "READ_TIMEOUT_S", LONG_S)
    monkeypatch.setattr(read_gate, "HURRIED_READ_S", 0.01)
    gate = ReadGate(max_reading=2, max_reading_per_connection=1)
    # Both have more calls that wait, and stall in their turn.
    tasks = [task for peer in "ab" for task in await start(gate, peer, Stalled(), 3)]
    assert await gate.read("c", arrived()) == b"request"
    await asyncio.sleep(0.1)
    # The last of each connection is in nobody's way.
    assert [task.done() for task in tasks] == [True, True, False] * 2
    await cancel(tasks)


async def test_who_finds_no_place_hurries_the_call_that_is_unread_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_gate, "READ_TIMEOUT_S", LONG_S)
    monkeypatch.setattr(read_gate, "HURRIED_READ_S", 0.01)
    gate = ReadGate()
    gate.hurry_oldest()
    first, second, third = await start(gate, "a", Stalled(), 3)
    gate.hurry_oldest()
    gate.hurry_oldest()
    with pytest.raises(RequestTooSlow):
        await first
    with pytest.raises(RequestTooSlow):
        await second
    await asyncio.sleep(0.05)
    assert not third.done()
    await cancel([third])


async def test_a_request_is_not_hurried_before_its_time() -> None:
    gate = ReadGate()
    tasks = await start(gate, "a", Stalled(), 1)
    gate.hurry_oldest()
    await asyncio.sleep(0.05)
    assert not tasks[0].done()
    await cancel(tasks)


async def test_a_call_without_a_message_has_none() -> None:
    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    assert await ReadGate().read("a", nothing()) is None
