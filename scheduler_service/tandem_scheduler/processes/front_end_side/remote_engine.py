"""The engine in a front-end process: behind one stream to the scheduler process. The stream and the process end
together.

Both ends say every HEARTBEAT_S that they are alive. A front end that is silent is killed by the other end. A scheduler
process that is silent stands still, for example because a signal stopped it, and may go on later: until then the front
end says that it is not ready and refuses new calls, while running calls wait.

Knows the wire and plain data; nothing of text or calls.
"""

import asyncio
import dataclasses
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc

from tandem.internal.v1 import engine_pb2, engine_pb2_grpc
from tandem.v1 import control_pb2_grpc
from tandem_scheduler.engine_interface import (
    HEARTBEAT_S,
    EngineListener,
    EngineState,
    RequestOutcome,
    Submission,
    fail_outputs,
    hand_on,
    tell_state,
)
from tandem_scheduler.processes.engine_codec import (
    decode_error,
    decode_outputs,
    decode_state,
    encode_outcome,
    encode_stats,
    encode_submit,
    handles_in,
)
from tandem_shared.errors import SequenceFailed, TandemError, WorkerUnavailable
from tandem_shared.rpc.grpc_options import LOCAL_OPTIONS

SILENCE_LIMIT_S = 10.0
"""A scheduler process that says nothing for this time stands still. Its event loop pauses for seconds only if the whole
machine does."""

logger = logging.getLogger(__name__)


class RemoteEngine:
    """An Engine at a Unix domain socket. It is started with connect() and then run()."""

    def __init__(self, socket_path: str) -> None:
        self._channel = grpc.aio.insecure_channel(f"unix:{socket_path}", LOCAL_OPTIONS)
        self.control = control_pb2_grpc.ControlServiceStub(self._channel)
        self.state = EngineState()
        self.load_report = b""
        self._outbox: asyncio.Queue[engine_pb2.AttachRequest] = asyncio.Queue()
        self._submitting: dict[int, asyncio.Future[None]] = {}
        # Counted in turns of this process's event loop, because this process may have stood still itself.
        self._silent_s = 0.0
        self._has_ended = False
        # Any, because the stubs declare that read() gives an object.
        self._call: Any = None

    async def connect(self, timeout_s: float) -> None:
        """Returns when the engine's state is known. Raises WorkerUnavailable without an answer in time."""
        self._call = engine_pb2_grpc.EngineServiceStub(self._channel).Attach(self._requests(), wait_for_ready=True)
        try:
            async with asyncio.timeout(timeout_s):
                first = await self._call.read()
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            raise WorkerUnavailable(f"no scheduler process: {error!r}") from error
        if first is grpc.aio.EOF:
            raise WorkerUnavailable("the scheduler process is leaving")
        self.state = decode_state(first.state)

    async def run(self, listener: EngineListener) -> None:
        """Says that the front end takes calls, and hands on what the stream brings until it ends."""
        await tell_state(listener, self.state)
        beating = asyncio.create_task(self._beat(listener))
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                await self._note_heard(listener)
                await self._take(message, listener)
        except grpc.aio.AioRpcError as error:
            raise WorkerUnavailable(f"the scheduler process is gone: {error.details()}") from error
        finally:
            beating.cancel()
            self._has_ended = True
            for submitting in self._submitting.values():
                if not submitting.done():
                    submitting.set_exception(WorkerUnavailable("the server is stopping"))

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()

    # Engine

    async def submit(self, submission: Submission) -> None:
        if self._has_ended:
            raise WorkerUnavailable("the server is stopping")
        if self._is_silent:
            raise WorkerUnavailable("the scheduler process stands still")
        submitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._submitting[submission.first_handle] = submitted
        self._send(submit=encode_submit(submission))
        try:
            await submitted
        finally:
            del self._submitting[submission.first_handle]

    def stop(self, handle: int, num_output_tokens: int) -> None:
        self._send(stop=engine_pb2.StopSequence(handle=handle, num_output_tokens=num_output_tokens))

    def close_request(self, first_handle: int, outcome: RequestOutcome | None = None) -> None:
        encoded = encode_outcome(outcome) if outcome is not None else None
        self._send(close=engine_pb2.CloseRequest(first_handle=first_handle, outcome=encoded))

    def _send(self, **kind: Any) -> None:
        self._outbox.put_nowait(engine_pb2.AttachRequest(**kind))

    async def _requests(self) -> AsyncIterator[engine_pb2.AttachRequest]:
        while True:
            yield await self._outbox.get()

    async def _beat(self, listener: EngineListener) -> None:
        while True:
            self._send(alive=engine_pb2.Alive(process_id=os.getpid()))
            if stats := listener.take_stats():
                self._send(stats=encode_stats(stats))
            await asyncio.sleep(HEARTBEAT_S)
            was_silent = self._is_silent
            self._silent_s += HEARTBEAT_S
            if self._is_silent and not was_silent:
                logger.error("the scheduler process has been silent for %.0f s", self._silent_s)
                await tell_state(listener, dataclasses.replace(self.state, is_ready=False))

    @property
    def _is_silent(self) -> bool:
        return self._silent_s > SILENCE_LIMIT_S

    async def _note_heard(self, listener: EngineListener) -> None:
        was_silent, self._silent_s = self._is_silent, 0.0
        if was_silent:
            logger.info("the scheduler process is back")
            await tell_state(listener, self.state)

    async def _take(self, message: engine_pb2.AttachResponse, listener: EngineListener) -> None:
        if message.load_report:
            self.load_report = message.load_report
        if message.HasField("state"):
            await self._take_state(message.state, listener)
        for reply in message.submit_replies:
            submitting = self._submitting.get(reply.first_handle)
            # It is gone if its call was cancelled.
            if submitting is not None and not submitting.done():
                if reply.HasField("error"):
                    submitting.set_exception(_read_error(reply.error))
                else:
                    submitting.set_result(None)
        _hand_on(message, listener)

    async def _take_state(self, message: engine_pb2.EngineState, listener: EngineListener) -> None:
        """Takes the engine's state. If it can't be read, the state that was known stays."""
        try:
            self.state = decode_state(message)
        except Exception:
            logger.exception("a state that the front end could not read")
        else:
            await tell_state(listener, self.state)


def _read_error(data: bytes) -> TandemError:
    try:
        return decode_error(data)
    except Exception:
        logger.exception("an error that the front end could not read")
        return SequenceFailed("the request was refused, with an error that the front end could not read")


def _hand_on(message: engine_pb2.AttachResponse, listener: EngineListener) -> None:
    try:
        batch = decode_outputs(message)
    except Exception:
        logger.exception("outputs that the front end could not read")
        fail_outputs(listener, handles_in(message))
    else:
        if batch:
            hand_on(listener, batch)
