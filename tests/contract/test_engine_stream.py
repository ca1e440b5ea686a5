"""The stream between a front-end process and the engine: one bad message costs one request."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tandem.internal.v1 import engine_pb2, engine_pb2_grpc
from tandem_scheduler.core.types import FinishReason
from tandem_scheduler.engine_interface import (
    EngineState,
    FrontEndStats,
    OutputBatch,
    RequestOutcome,
    SequenceEnd,
    Submission,
)
from tandem_scheduler.processes.engine_codec import HANDLES, encode_outputs
from tandem_scheduler.processes.engine_side.engine_servicer import EngineServicer
from tandem_scheduler.processes.front_end_side import remote_engine
from tandem_scheduler.processes.front_end_side.remote_engine import RemoteEngine
from tandem_shared.errors import QueueFull, SequenceFailed
from tandem_shared.rpc.grpc_options import LOCAL_OPTIONS
from tandem_shared.step_codec import pack_ids
from tests.contract.services import wait_until
from tests.support.builders import create_request

Response = engine_pb2.AttachResponse


def tokens(handles: list[int], token_ids: list[int]) -> engine_pb2.AttachResponse:
    return encode_outputs(OutputBatch(handles, token_ids))


def submission(request_id: str, first_handle: int) -> Submission:
    return Submission(request_id, first_handle, create_request(), 1, "fake-model")


class Listener:
    """A listener that fails at outputs of some handles and, if asked to, at states."""

    def __init__(self, bad_handles: frozenset[int] = frozenset(), *, fails_at_states: bool = False) -> None:
        self._bad_handles = bad_handles
        self._fails_at_states = fails_at_states
        self.tokens: list[tuple[int, int]] = []
        self.ends: list[SequenceEnd] = []
        self.states: list[EngineState] = []

    def on_outputs(self, batch: OutputBatch) -> None:
        if self._bad_handles & set(batch.token_handles):
            raise ValueError("a detokenizer's fault")
        self.tokens += zip(batch.token_handles, batch.token_ids, strict=True)
        self.ends += batch.ends

    async def on_state(self, state: EngineState) -> None:
        self.states.append(state)
        if self._fails_at_states:
            raise RuntimeError("a server's fault")

    def take_stats(self) -> FrontEndStats:
        return FrontEndStats()


class ScriptedEngine(engine_pb2_grpc.EngineServiceServicer):
    """An engine that sends what the test puts into its queue, and ends the stream at None."""

    def __init__(self) -> None:
        self.responses: asyncio.Queue[Response | None] = asyncio.Queue()
        self.requests: list[engine_pb2.AttachRequest] = []

    async def Attach(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Response]:
        reading = asyncio.create_task(self._read(request_iterator))
        while (response := await self.responses.get()) is not None:
            yield response
        reading.cancel()

    async def _read(self, requests: AsyncIterator[engine_pb2.AttachRequest]) -> None:
        async for request in requests:
            self.requests.append(request)


@asynccontextmanager
async def serving(servicer: engine_pb2_grpc.EngineServiceServicer, folder: Path) -> AsyncIterator[str]:
    server = grpc.aio.server(options=LOCAL_OPTIONS)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{folder}/engine.sock")
    await server.start()
    try:
        yield f"{folder}/engine.sock"
    finally:
        await server.stop(0)


async def run(listener: Listener, folder: Path, act: Callable[[ScriptedEngine, RemoteEngine], Awaitable[None]]) -> None:
    """Runs a remote engine up to the end of its stream."""
    scripted = ScriptedEngine()
    async with serving(scripted, folder) as socket_path:
        engine = RemoteEngine(socket_path)
        scripted.responses.put_nowait(Response(state=engine_pb2.EngineState(is_ready=True)))
        await engine.connect(10)
        running = asyncio.create_task(engine.run(listener))
        await act(scripted, engine)

        async def is_heard() -> bool:
            return any(request.HasField("alive") for request in scripted.requests)

        # A message that is under way when the stream ends would hide how it ended.
        await wait_until(is_heard, "the front end has said that it is alive")
        scripted.responses.put_nowait(None)
        # The engine has read all that came before the end.
        await running
        await engine.close()


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("e")


async def test_outputs_that_the_front_end_cannot_take_end_their_requests_alone(folder: Path) -> None:
    listener = Listener(frozenset({2}))

    async def act(scripted: ScriptedEngine, _: RemoteEngine) -> None:
        scripted.responses.put_nowait(tokens([1, 3], [10, 30]))
        scripted.responses.put_nowait(tokens([2, 2], [20, 21]))
        scripted.responses.put_nowait(tokens([1], [11]))

    await run(listener, folder, act)
    assert listener.tokens == [(1, 10), (3, 30), (1, 11)]
    [end] = listener.ends
    assert (end.handle, end.reason) == (2, FinishReason.ERROR)
    assert isinstance(end.error, SequenceFailed)


async def test_outputs_that_cannot_be_decoded_end_their_requests_alone(folder: Path) -> None:
    listener = Listener()

    async def act(scripted: ScriptedEngine, _: RemoteEngine) -> None:
        # This end has no reason.
        scripted.responses.put_nowait(
            Response(
                token_handles=np.array([4], HANDLES).tobytes(),
                token_ids=pack_ids([40]),
                ends=[engine_pb2.SequenceEnd(handle=5)],
            )
        )
        scripted.responses.put_nowait(tokens([1], [11]))

    await run(listener, folder, act)
    assert listener.tokens == [(1, 11)]
    assert [end.handle for end in listener.ends] == [4, 5]


async def test_a_state_that_the_front_end_cannot_take_ends_nothing(folder: Path) -> None:
    listener = Listener(fails_at_states=True)

    async def act(scripted: ScriptedEngine, _: RemoteEngine) -> None:
        scripted.responses.put_nowait(Response(state=engine_pb2.EngineState(is_draining=True)))
        scripted.responses.put_nowait(tokens([1], [11]))

    await run(listener, folder, act)
    assert [state.is_draining for state in listener.states] == [False, True]
    assert listener.tokens == [(1, 11)]


async def test_a_reply_that_cannot_be_read_ends_its_submit_alone(folder: Path) -> None:
    async def act(scripted: ScriptedEngine, engine: RemoteEngine) -> None:
        first, second = (asyncio.create_task(engine.submit(submission(f"r{n}", n))) for n in (1, 2))
        await asyncio.sleep(0)
        replies = [engine_pb2.SubmitReply(first_handle=1, error=b"\xff"), engine_pb2.SubmitReply(first_handle=2)]
        scripted.responses.put_nowait(Response(submit_replies=replies))
        with pytest.raises(SequenceFailed):
            await first
        await second

    await run(Listener(), folder, act)


async def test_a_silent_scheduler_process_makes_the_front_end_unready_until_it_speaks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_engine, "SILENCE_LIMIT_S", 1.5)
    listener = Listener()

    async def act(scripted: ScriptedEngine, _: RemoteEngine) -> None:
        async def is_unready() -> bool:
            return len(listener.states) == 2

        await wait_until(is_unready, "it is not ready")
        # An empty message is the other end's heartbeat.
        scripted.responses.put_nowait(Response())
        await wait_until(is_ready, "it is ready")
        assert len([each for each in scripted.requests if each.HasField("alive")]) >= 2

    async def is_ready() -> bool:
        return len(listener.states) == 3

    await run(listener, folder, act)
    assert [state.is_ready for state in listener.states] == [True, False, True]


class FaultyHub:
    """A hub that fails at the second request and at ends, and sends outputs that no message can hold."""

    state = EngineState()

    def __init__(self) -> None:
        self.listener: Any = None
        self.submitted: list[str] = []

    def attach(self, listener: Any, is_gone: Callable[[], bool]) -> Any:
        self.listener = listener
        return self

    def detach(self, _: Any) -> None:
        self.listener = None

    async def submit(self, submission: Submission) -> None:
        if submission.request_id == "bug":
            raise KeyError("a bug")
        if submission.request_id == "full":
            raise QueueFull("full")
        self.submitted.append(submission.request_id)

    def stop(self, handle: int, num_output_tokens: int) -> None:
        raise KeyError("a bug")

    def close_request(self, first_handle: int, outcome: RequestOutcome | None = None) -> None:
        raise KeyError("a bug")


async def test_a_bug_in_the_engine_ends_the_request_that_meets_it_alone(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub, listener = FaultyHub(), Listener()
    with caplog.at_level(logging.ERROR):
        async with serving(EngineServicer(hub, lambda _: None), folder) as socket_path:  # type: ignore[arg-type]
            engine = RemoteEngine(socket_path)
            await engine.connect(10)
            running = asyncio.create_task(engine.run(listener))
            with pytest.raises(SequenceFailed):
                await engine.submit(submission("bug", 1))
            engine.stop(7, 3)
            engine.close_request(1)
            with pytest.raises(QueueFull):
                await engine.submit(submission("full", 2))
            await engine.submit(submission("good", 3))
            hub.listener.on_outputs(OutputBatch([3, 4], [30, 2**31]))

            async def has_ended() -> bool:
                return len(listener.ends) == 2

            await wait_until(has_ended, "both ends")
            hub.listener.on_outputs(OutputBatch([5], [50]))

            async def has_token() -> bool:
                return listener.tokens == [(5, 50)]

            await wait_until(has_token, "what comes after")
            assert not running.done()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await engine.close()
    assert [end.handle for end in listener.ends] == [3, 4]
    assert hub.submitted == ["good"]
    assert sum("KeyError" in (record.exc_text or "") for record in caplog.records) == 3
