"""Rank 0's side of a tensor-parallel group, where processes can't easily be made to fail so."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener
from types import SimpleNamespace
from typing import Any

import pytest

from tandem_shared.errors import InvalidPlan
from tandem_shared.step_plan import StepPlan
from tandem_worker.ranks import rank_group
from tandem_worker.ranks.rank_group import PLAN, LeadingRunner
from tests.e2e.waiting import WAIT_S, wait_until


class Failed(Exception):
    """In place of the end of the process."""


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the group was given up for."""
    problems: list[str] = []

    def fail(problem: str) -> None:
        problems.append(problem)
        raise Failed

    monkeypatch.setattr(rank_group, "fail", fail)
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


def test_a_step_that_fails_on_rank_0_alone_is_the_sessions_to_stop_at(problems: list[str]) -> None:
    """As at every size: tests/contract/test_worker_service.py says what it does. Rank 0 ends, and so the others."""
    runner, sent = lead(MemoryError("too little memory"))
    with pytest.raises(MemoryError):
        runner.execute(StepPlan(1))
    assert sent == [PLAN] and not problems


def test_ranks_that_do_not_end_together_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    has_failed = threading.Event()
    destroyed: list[bool] = []
    monkeypatch.setattr(rank_group, "fail", lambda problem: has_failed.set())
    monkeypatch.setattr(rank_group, "LEAVE_LIMIT_S", 0.2)
    monkeypatch.setattr(rank_group.dist, "destroy_process_group", lambda: destroyed.append(True))
    rank_group.leave_group(SimpleNamespace(close=lambda: None))  # type: ignore[arg-type]
    time.sleep(0.4)
    assert destroyed == [True] and not has_failed.is_set()
    # Its device never gets done.
    rank_group.leave_group(SimpleNamespace(close=lambda: has_failed.wait(WAIT_S)))  # type: ignore[arg-type]
    assert has_failed.is_set()


def test_a_plan_that_no_rank_can_follow_ends_nothing(problems: list[str]) -> None:
    runner, _ = lead(InvalidPlan("computes nothing"))
    with pytest.raises(InvalidPlan):
        runner.execute(StepPlan(1))
    assert not problems


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, problems: list[str]) -> Iterator[tuple[rank_group._Channel, Connection]]:
    """A channel to rank 1, and rank 1's end of it."""
    with Listener(("127.0.0.1", 0)) as listener:
        clients: list[Connection] = []
        thread = threading.Thread(target=lambda: clients.append(Client(listener.address)))
        thread.start()
        mine = listener.accept()
        thread.join()
    channel = rank_group._Channel(mine, "rank 1")
    monkeypatch.setattr(rank_group, "HEARTBEAT_S", 0.05)
    threads: list[threading.Thread] = []
    start_thread = rank_group._start_thread
    monkeypatch.setattr(rank_group, "_start_thread", lambda *args: threads.append(start_thread(*args)))
    yield channel, clients[0]
    # Its threads end, before fail is again what it was.
    channel.is_closing = True
    clients[0].close()
    for thread in threads:
        thread.join(WAIT_S)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_peer_that_stops_reading_and_speaking_is_lost(
    monkeypatch: pytest.MonkeyPatch, problems: list[str], peer: tuple[rank_group._Channel, Connection]
) -> None:
    monkeypatch.setattr(rank_group, "SILENCE_LIMIT_S", 0.5)
    channel, end = peer
    end.send_bytes(rank_group.ALIVE)
    channel.receive()
    # More than the connection holds: this waits for ever, with the lock.
    threading.Thread(target=channel.send, args=(PLAN, bytes(64 << 20)), daemon=True).start()
    time.sleep(0.1)
    channel.start()
    wait_until(lambda: bool(problems), "the silence is noticed", 10)
    assert "rank 1 has been silent" in problems[0]


@pytest.mark.parametrize("state", ["never told", "loop is closed", "told"])
def test_a_lost_group_ends_its_process_whatever_became_of_the_server(state: str) -> None:
    """In a process of its own: the real fail(), before there is an event loop, after it, and while it runs."""
    program = f"""
import asyncio, os, threading
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner
from tandem_worker.ranks import rank_group
from tandem_worker.service.servicer import WorkerServicer

rank_group.LAST_WORDS_S = 0.2

async def serve(servicer):
    failing = asyncio.create_task(servicer.run_until_failure())
    await asyncio.sleep(0)
    if {state!r} == "told":
        threading.Thread(target=rank_group.fail, args=["rank 1 is gone"], daemon=True).start()
        print("reason:", await failing, flush=True)
        await asyncio.sleep(60)
    failing.cancel()

if {state!r} != "never told":
    servicer = WorkerServicer(FakeRunner(worker_info()))
    rank_group.tell_failures(servicer.fail_from_thread)
    asyncio.run(serve(servicer))
rank_group.fail("rank 1 is gone")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 1, done.stderr
    assert "the tensor-parallel group is lost: rank 1 is gone" in done.stderr
    assert ("reason: the tensor-parallel group is lost: rank 1 is gone" in done.stdout) == (state == "told")
