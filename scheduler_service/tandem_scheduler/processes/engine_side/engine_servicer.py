"""The engine for front ends in other processes: each stream stands for one front end's Engine and its listener.

The step loop never waits here: messages that a stream's reader has not taken yet gather in an outbox.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import grpc

from tandem.internal.v1 import engine_pb2, engine_pb2_grpc
from tandem_scheduler.engine.hub import Attachment, EngineHub
from tandem_scheduler.engine_interface import EngineState, FrontEndStats, OutputBatch, failed_outputs
from tandem_scheduler.front_end.validation import check_submission
from tandem_scheduler.processes.engine_codec import (
    decode_outcome,
    decode_stats,
    decode_submit,
    encode_error,
    encode_outputs,
    encode_state,
)
from tandem_shared.errors import SequenceFailed, TandemError, UnexpectedMessage

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

logger = logging.getLogger(__name__)


class _Outbox:
    """An engine's listener that keeps the news until the stream takes them."""

    def __init__(self, state: EngineState) -> None:
        self._state: EngineState | None = state
        self._submit_replies: list[engine_pb2.SubmitReply] = []
        self._batch = OutputBatch()
        self._has_news = asyncio.Event()
        self._has_news.set()
        self._is_closed = False
        self._is_beat_due = False
        self._load_report = b""
        self._stats = FrontEndStats()
        self.process_id: int | None = None
        """The front end's process id, once the front end has said it."""

    def on_outputs(self, batch: OutputBatch) -> None:
        if self._batch:
            self._batch.extend(batch)
        else:
            self._batch = batch
        self._has_news.set()

    async def on_state(self, state: EngineState) -> None:
        self._state = state
        self._has_news.set()

    def add_stats(self, stats: FrontEndStats) -> None:
        self._stats.add(stats)

    def take_stats(self) -> FrontEndStats:
        taken, self._stats = self._stats, FrontEndStats()
        return taken

    def reply(self, reply: engine_pb2.SubmitReply) -> None:
        self._submit_replies.append(reply)
        self._has_news.set()

    def say_alive(self, load_report: bytes) -> None:
        """Sends a message even if there is nothing else to say."""
        self._load_report = load_report
        self._is_beat_due = True
        self._has_news.set()

    def close(self) -> None:
        self._is_closed = True
        self._has_news.set()

    async def messages(self) -> AsyncIterator[engine_pb2.AttachResponse]:
        """Yields messages until the outbox is closed and empty."""
        while self._has_contents or not self._is_closed:
            await self._has_news.wait()
            self._has_news.clear()
            if self._has_contents:
                yield self._take()

    @property
    def _has_contents(self) -> bool:
        return self._is_beat_due or self._state is not None or bool(self._submit_replies) or bool(self._batch)

    def _take(self) -> engine_pb2.AttachResponse:
        message = _encode(self._batch)
        message.submit_replies.extend(self._submit_replies)
        if self._state is not None:
            message.state.CopyFrom(encode_state(self._state))
        if self._is_beat_due:
            message.load_report = self._load_report
        self._batch, self._submit_replies, self._state, self._is_beat_due = OutputBatch(), [], None, False
        return message


def _encode(batch: OutputBatch) -> engine_pb2.AttachResponse:
    """Encodes outputs. Those that no message can hold end their own requests, and not the stream of all."""
    try:
        return encode_outputs(batch)
    except Exception:
        logger.exception("outputs that can't be sent to a front end")
    failed = OutputBatch()
    for each in failed_outputs(batch.handles, SequenceFailed("its outputs could not be sent to its front end")):
        failed.extend(each)
    return encode_outputs(failed)


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    def __init__(
        self, hub: EngineHub, on_alive: Callable[[int], None], has_ended: Callable[[int], bool] = lambda _: False
    ) -> None:
        """on_alive is called with a front end's process id whenever that says that it is alive. has_ended says whether
        a process has ended or begun to end.
        """
        self._hub = hub
        self._on_alive = on_alive
        self._has_ended = has_ended
        self._outboxes: list[_Outbox] = []
        self._is_closed = False

    def say_alive(self) -> None:
        """Tells every front end that this process is alive."""
        load_report = self._hub.load_report()
        for outbox in self._outboxes:
            outbox.say_alive(load_report)

    def close(self) -> None:
        """Ends all streams, now and later, so that the front ends leave."""
        self._is_closed = True
        for outbox in self._outboxes:
            outbox.close()

    async def Attach(
        self, request_iterator: AsyncIterator[engine_pb2.AttachRequest], context: Context
    ) -> AsyncIterator[engine_pb2.AttachResponse]:
        if self._is_closed:
            return
        outbox = _Outbox(self._hub.state)
        engine = self._hub.attach(outbox, lambda: outbox.process_id is not None and self._has_ended(outbox.process_id))
        self._outboxes.append(outbox)
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
            kind = request.WhichOneof("kind")
            if kind == "submit":
                outbox.reply(await _submit(engine, request.submit))
            elif kind == "alive":
                outbox.process_id = request.alive.process_id
                self._on_alive(request.alive.process_id)
            elif kind == "stats":
                outbox.add_stats(decode_stats(request.stats))
            elif kind in ("stop", "close"):
                _end(engine, request)
            else:
                raise UnexpectedMessage(f"a front end sent {kind}")


async def _submit(engine: Attachment, message: engine_pb2.SubmitRequest) -> engine_pb2.SubmitReply:
    """Submits a request. Whatever is wrong with it ends this request alone."""
    reply = engine_pb2.SubmitReply(first_handle=message.first_handle)
    try:
        submission = decode_submit(message)
        check_submission(submission, engine.state.worker)
        await engine.submit(submission)
    except TandemError as error:
        reply.error = encode_error(error)
    except Exception:
        logger.exception("a request that can't be submitted")
        reply.error = encode_error(SequenceFailed("the request could not be submitted"))
    return reply


def _end(engine: Attachment, request: engine_pb2.AttachRequest) -> None:
    """Ends a sequence or a whole request. If that fails it is a bug, which must not harm other requests."""
    try:
        if request.HasField("stop"):
            engine.stop(request.stop.handle, request.stop.num_output_tokens)
        else:
            close = request.close
            outcome = decode_outcome(close.outcome) if close.HasField("outcome") else None
            engine.close_request(close.first_handle, outcome)
    except Exception:
        logger.exception("a request that can't be ended")
