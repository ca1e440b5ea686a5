"""The engine as a front-end process has it: behind one stream to the scheduler process. The two live and end together.

Knows the wire and plain data; nothing of text or calls.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from scheduler_service.engine import EngineListener, EngineState, Submission
from scheduler_service.engine_codec import decode_error, decode_outputs, decode_state, encode_submit
from shared.errors import WorkerUnavailable
from shared.grpc_options import LOCAL_OPTIONS
from tandem.v1 import control_pb2_grpc, engine_pb2, engine_pb2_grpc


class RemoteEngine:
    """An Engine at a Unix domain socket. Start it with connect(), then run()."""

    def __init__(self, socket_path: str) -> None:
        self._channel = grpc.aio.insecure_channel(f"unix:{socket_path}", LOCAL_OPTIONS)
        self.control = control_pb2_grpc.ControlServiceStub(self._channel)
        self.state = EngineState()
        self._outbox: asyncio.Queue[engine_pb2.AttachRequest] = asyncio.Queue()
        self._submitting: dict[int, asyncio.Future[None]] = {}
        # Typed by hand: the stubs have it that read() gives an object.
        self._call: Any = None

    async def connect(self, timeout_s: float) -> None:
        """Until the engine's state is known. WorkerUnavailable where nobody answers."""
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
        """Hands on what comes until the stream ends, and with it the engine."""
        await listener.on_state(self.state)
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                await self._take(message, listener)
        except grpc.aio.AioRpcError as error:
            raise WorkerUnavailable(f"the scheduler process is gone: {error.details()}") from error
        finally:
            for submitting in self._submitting.values():
                if not submitting.done():
                    submitting.set_exception(WorkerUnavailable("the server is stopping"))

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()

    def say_listening(self) -> None:
        self._send(listening=engine_pb2.Listening())

    # Engine

    async def submit(self, submission: Submission) -> None:
        submitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._submitting[submission.first_handle] = submitted
        self._send(submit=encode_submit(submission))
        try:
            await submitted
        finally:
            del self._submitting[submission.first_handle]

    def stop(self, handle: int, num_output_tokens: int) -> None:
        self._send(stop=engine_pb2.StopSequence(handle=handle, num_output_tokens=num_output_tokens))

    def close_request(self, first_handle: int) -> None:
        self._send(close=engine_pb2.CloseRequest(first_handle=first_handle))

    def _send(self, **kind: Any) -> None:
        self._outbox.put_nowait(engine_pb2.AttachRequest(**kind))

    async def _requests(self) -> AsyncIterator[engine_pb2.AttachRequest]:
        while True:
            yield await self._outbox.get()

    async def _take(self, message: engine_pb2.AttachResponse, listener: EngineListener) -> None:
        if message.HasField("state"):
            self.state = decode_state(message.state)
            await listener.on_state(self.state)
        for reply in message.submit_replies:
            submitting = self._submitting.get(reply.first_handle)
            # Gone where its call was cancelled.
            if submitting is not None and not submitting.done():
                if reply.HasField("error"):
                    submitting.set_exception(decode_error(reply.error))
                else:
                    submitting.set_result(None)
        if batch := decode_outputs(message):
            listener.on_outputs(batch)
