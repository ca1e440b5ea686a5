"""Plans from rank 0 to the other ranks, and the failures of either end that processes can't easily be brought to."""

import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener
from types import SimpleNamespace
from typing import Any

import pytest

from tandem_shared.errors import InvalidPlan
from tandem_shared.step_plan import StepPlan
from tandem_worker.ranks import plan_channel
from tandem_worker.ranks.plan_channel import PLAN, LeadingRunner
from tests.e2e.waiting import WAIT_S, wait_until


class Failed(Exception):
    """Raised instead of ending the process."""


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The problems for which the group was given up."""
    problems: list[str] = []

    def fail(problem: str) -> None:
        problems.append(problem)
        raise Failed

    monkeypatch.setattr(plan_channel, "fail", fail)
    return problems


class FailingRunner:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def execute(self, plan: StepPlan) -> Any:
        raise self._error


def lead(error: Exception) -> tuple[LeadingRunner, list[bytes]]:
    sent: list[bytes] = []
    leader = SimpleNamespace(send=lambda kind, body=b"": sent.append(kind))
    return LeadingRunner(FailingRunner(error), leader), sent  # type: ignore[arg-type]


def test_a_step_that_fails_on_rank_0_is_left_to_its_session(problems: list[str]) -> None:
    """The session ends rank 0, as with one rank (tests/contract/test_worker_failures.py); the other ranks follow."""
    runner, sent = lead(MemoryError("too little memory"))
    with pytest.raises(MemoryError):
        runner.execute(StepPlan(1))
    assert sent == [PLAN] and not problems


def test_a_plan_that_no_rank_can_follow_ends_nothing(problems: list[str]) -> None:
    runner, _ = lead(InvalidPlan("computes nothing"))
    with pytest.raises(InvalidPlan):
        runner.execute(StepPlan(1))
    assert not problems


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, problems: list[str]) -> Iterator[tuple[plan_channel.Channel, Connection]]:
    """A channel to rank 1, and rank 1's end of it."""
    with Listener(("127.0.0.1", 0)) as listener:
        clients: list[Connection] = []
        thread = threading.Thread(target=lambda: clients.append(Client(listener.address)))
        thread.start()
        connection = listener.accept()
        thread.join()
    channel = plan_channel.Channel(connection, "rank 1")
    monkeypatch.setattr(plan_channel, "HEARTBEAT_S", 0.05)
    threads: list[threading.Thread] = []
    start_thread = plan_channel._start_thread
    monkeypatch.setattr(plan_channel, "_start_thread", lambda *args: threads.append(start_thread(*args)))
    yield channel, clients[0]
    # The channel's threads must end before the real fail() is back.
    channel.is_closing = True
    clients[0].close()
    for thread in threads:
        thread.join(WAIT_S)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_peer_that_stops_reading_and_speaking_is_lost(
    monkeypatch: pytest.MonkeyPatch, problems: list[str], peer: tuple[plan_channel.Channel, Connection]
) -> None:
    monkeypatch.setattr(plan_channel, "SILENCE_LIMIT_S", 0.5)
    channel, end = peer
    end.send_bytes(plan_channel.ALIVE)
    channel.receive()
    # This is more than the connection's buffers hold, so that sending waits for ever, with the lock.
    threading.Thread(target=channel.send, args=(PLAN, bytes(64 << 20)), daemon=True).start()
    time.sleep(0.1)
    channel.start()
    wait_until(lambda: bool(problems), "the silence is noticed", 10)
    assert "rank 1 has been silent" in problems[0]
