"""The engine for front ends in other processes: each stream is one front end's Engine, and its listener.

The step loop never waits here: what a stream's reader has not taken yet gathers in an outbox.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import grpc

from scheduler_service.engine import EngineState, OutputBatch
from scheduler_service.engine_codec import decode_submit, encode_error, encode_outputs, encode_state
from scheduler_service.engine_hub import Attachment, EngineHub
from shared.errors import ProtocolError, TandemError
from tandem.v1 import engine_pb2, engine_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class _Outbox:
    """An engine's listener whose news leave when the stream takes them."""

    def __init__(self, state: EngineState) -> None:
        self._state: EngineState | None = state
        self._submit_replies: list[engine_pb2.SubmitReply] = []
        self._batch = OutputBatch()
        self._has_news = asyncio.Event()
        self._has_news.set()
        self._is_closed = False

    def on_outputs(self, batch: OutputBatch) -> None:
        if self._batch:
            self._batch.extend(batch)
        else:
            self._batch = batch
        self._has_news.set()

    async def on_state(self, state: EngineState) -> None:
        self._state = state
        self._has_news.set()

    def reply(self, reply: engine_pb2.SubmitReply) -> None:
        self._submit_replies.append(reply)
        self._has_news.set()

    def close(self) -> None:
        self._is_closed = True
        self._has_news.set()

    async def messages(self) -> AsyncIterator[engine_pb2.AttachResponse]:
        """Until closed, and what came before that."""
        while self._has_contents or not self._is_closed:
            await self._has_news.wait()
            self._has_news.clear()
            if self._has_contents:
                yield self._take()

    @property
    def _has_contents(self) -> bool:
        return self._state is not None or bool(self._submit_replies) or bool(self._batch)

    def _take(self) -> engine_pb2.AttachResponse:
        message = encode_outputs(self._batch)
        message.submit_replies.extend(self._submit_replies)
        if self._state is not None:
            message.state.CopyFrom(encode_state(self._state))
        self._batch, self._submit_replies, self._state = OutputBatch(), [], None
        return message


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    def __init__(self, hub: EngineHub, on_listening: Callable[[], None]) -> None:
        """on_listening hears of each front end that takes calls."""
        self._hub = hub
        self._on_listening = on_listening
        self._outboxes: set[_Outbox] = set()
        self._is_closed = False

    def close(self) -> None:
        """Ends all streams, and those that come later; the front ends leave."""
        self._is_closed = True
        for outbox in self._outboxes:
            outbox.close()

    async def Attach(
        self, request_iterator: AsyncIterator[engine_pb2.AttachRequest], context: Context
    ) -> AsyncIterator[engine_pb2.AttachResponse]:
        if self._is_closed:
            return
        outbox = _Outbox(self._hub.state)
        engine = self._hub.attach(outbox)
        self._outboxes.add(outbox)
        reading = asyncio.create_task(self._read(request_iterator, engine, outbox))
        reading.add_done_callback(lambda _: outbox.close())
        try:
            async for message in outbox.messages():
                yield message
            if reading.done():
                reading.result()
        finally:
            reading.cancel()
            self._outboxes.remove(outbox)
            self._hub.detach(engine)

    async def _read(
        self, requests: AsyncIterator[engine_pb2.AttachRequest], engine: Attachment, outbox: _Outbox
    ) -> None:
        async for request in requests:
            match request.WhichOneof("kind"):
                case "submit":
                    outbox.reply(await _submit(engine, request.submit))
                case "stop":
                    engine.stop(request.stop.handle, request.stop.num_output_tokens)
                case "close":
                    engine.close_request(request.close.first_handle)
                case "listening":
                    self._on_listening()
                case kind:
                    raise ProtocolError(f"a front end sent {kind}")


async def _submit(engine: Attachment, message: engine_pb2.SubmitRequest) -> engine_pb2.SubmitReply:
    reply = engine_pb2.SubmitReply(first_handle=message.first_handle)
    try:
        await engine.submit(decode_submit(message))
    except TandemError as error:
        reply.error = encode_error(error)
    return reply
