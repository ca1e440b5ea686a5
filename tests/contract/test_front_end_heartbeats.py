"""Front-end processes that fall silent are replaced. Those that are slow, or not to blame for it, stay."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import grpc
import psutil
import pytest

from tandem_scheduler.processes.engine_side import front_end_pool
from tandem_scheduler.processes.engine_side.engine_servicer import EngineServicer
from tandem_scheduler.processes.engine_side.front_end_pool import FrontEndPool
from tandem_shared.errors import ConfigError
from tests.contract.front_ends import front_end_processes, gated_services, reach_a_third, two_front_ends
from tests.contract.gated_worker import open_gate
from tests.contract.services import Services, read_stream, stream_request, true_tokens, wait_until

SILENCE_LIMIT_S = 3.0


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_end_pool, "SILENCE_LIMIT_S", SILENCE_LIMIT_S)


@pytest.mark.usefixtures("short_limit")
async def test_a_frozen_front_end_is_killed_and_replaced_and_its_requests_alone_are_closed() -> None:
    requests = [stream_request([number] * 100, 60, request_id=f"r{number}") for number in range(2)]
    services = gated_services()
    async with two_front_ends(services) as (first, second):
        lost, kept = (
            asyncio.create_task(each.stream(request)) for each, request in zip((first, second), requests, strict=True)
        )
        await services.wait_load(lambda load: load.num_running_sequences + load.num_waiting_sequences == 2, "both came")
        open_gate(services.runner, 5)
        first.process.send_signal(signal.SIGSTOP)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await lost
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

        async def is_closed() -> bool:
            load = await second.load()
            return load.num_running_sequences + load.num_waiting_sequences == 1

        await wait_until(is_closed, "its request is closed")
        open_gate(services.runner)
        assert (await kept).token_ids == true_tokens(requests[1])

        async def is_replaced() -> bool:
            return len(front_end_processes()) == 2 and (await reach_a_third(services, [first, second]))

        await wait_until(is_replaced, "a new front end takes calls")


@pytest.mark.slow
@pytest.mark.usefixtures("short_limit")
async def test_a_front_end_that_pauses_stays() -> None:
    async with two_front_ends(gated_services()) as connections:
        before = front_end_processes()
        for connection in connections:
            connection.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(SILENCE_LIMIT_S / 2)
        for connection in connections:
            connection.process.send_signal(signal.SIGCONT)
        # This is longer than it takes to find a silent front end.
        await asyncio.sleep(SILENCE_LIMIT_S + 1.5)
        assert front_end_processes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("short_limit")
async def test_front_ends_are_not_blamed_for_a_pause_of_the_scheduler_process() -> None:
    async with two_front_ends(gated_services()):
        before = front_end_processes()
        # The event loop of the scheduler process receives nothing meanwhile.
        time.sleep(SILENCE_LIMIT_S + 1.5)
        await asyncio.sleep(1.5)
        assert front_end_processes() == before


async def test_a_front_end_that_hangs_before_it_listens_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_end_pool, "START_LIMIT_S", 0.5)
    monkeypatch.setattr(FrontEndPool, "_command", lambda *_: ["sleep", "60"])
    services = Services(api_server_count=1)
    with pytest.raises(ConfigError, match="a front-end process ended with status -9 before it listened"):
        await services.start()
    await services.stop_worker()


def test_a_process_has_ended_before_its_end_is_collected() -> None:
    process = subprocess.Popen(["sleep", "60"])
    assert not front_end_pool.has_ended(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert front_end_pool.has_ended(process.pid)
    assert process.wait() == -signal.SIGKILL
    assert front_end_pool.has_ended(process.pid)


ACCEPTS = """
import os, socket, sys
memory = bytearray(100 << 20)
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    accepted = [listener.accept()[0] for _ in range(30)]
    print("accepted", flush=True)
    sys.stdin.read()
"""


def test_whoever_sees_a_process_s_connections_close_finds_that_it_has_ended() -> None:
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", ACCEPTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
            assert process.stdout.readline() == "accepted\n"
            assert not front_end_pool.has_ended(process.pid)
            process.kill()
            with contextlib.suppress(ConnectionResetError):
                connections[0].recv(1)
            assert front_end_pool.has_ended(process.pid)
            for connection in connections:
                connection.close()


@pytest.mark.parametrize("process_id", [0, 2**32 - 1])
def test_what_is_no_process_id_has_not_ended(process_id: int) -> None:
    assert not front_end_pool.has_ended(process_id)


class FailsOnce:
    """A function that raises at its first call."""

    def __init__(self, function: Any, error: Exception) -> None:
        self._function = function
        self._error = error
        self.num_calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.num_calls += 1
        if self.num_calls == 1:
            raise self._error
        return self._function(*args, **options)


async def wait_for_another(before: list[psutil.Process]) -> None:
    async def is_replaced() -> bool:
        return bool(front_end_processes()) and front_end_processes() != before

    await wait_until(is_replaced, "another front end runs")


@pytest.mark.parametrize(
    "error", [OSError(errno.EAGAIN, "no process to be had"), RuntimeError("can't start new thread")], ids=repr
)
async def test_a_front_end_that_cannot_be_started_again_at_first_is_started_later(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with Services(api_server_count=1) as services:
        start = FailsOnce(asyncio.create_subprocess_exec, error)
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
        [process] = before = front_end_processes()
        process.kill()
        await wait_for_another(before)
        # No process listens until the new one does, so the call waits for a connection.
        call = services.inference.GenerateStream(stream_request(), wait_for_ready=True, timeout=30)
        assert (await read_stream(call)).token_ids == true_tokens(stream_request())
    assert start.num_calls == 2
    assert f"could not be started ({error})" in caplog.text


async def test_a_front_end_that_cannot_be_started_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    start = FailsOnce(asyncio.create_subprocess_exec, OSError(errno.ENOMEM, "no memory"))
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    services = Services(api_server_count=1)
    with pytest.raises(ConfigError, match="no memory"):
        await services.start()
    await services.stop_worker()


@pytest.mark.slow
@pytest.mark.usefixtures("short_limit")
async def test_the_watch_goes_on_after_a_fault_of_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beat = FailsOnce(EngineServicer.say_alive, ZeroDivisionError("a fault"))
    monkeypatch.setattr(EngineServicer, "say_alive", lambda *args: beat(*args))
    async with Services(api_server_count=1):
        [process] = before = front_end_processes()
        process.send_signal(signal.SIGSTOP)
        await wait_for_another(before)
    assert "ZeroDivisionError: a fault" in caplog.text
