"""The worker's side of the step protocol: which scheduler has the session, and the stream's messages. Knows no torch.

One session at a time runs on a Runner (session.py). After a step has failed there are no more sessions: readiness goes
first, then the session gets the reason as its last word, and the process that owns the servicer ends.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from tandem.internal.v1 import worker_pb2
from tandem_shared.config import STEP_TIMEOUT_S
from tandem_shared.errors import (
    FieldViolation,
    InvalidRequest,
    SessionRefused,
    SessionTaken,
    TandemError,
    UnexpectedMessage,
    WorkerFailed,
)
from tandem_shared.metrics.exposition import Samples
from tandem_shared.rpc.rich_status import status_of
from tandem_shared.step_codec import PROTOCOL_VERSION, decode_plan, encode_info, encode_result
from tandem_worker.runners.runner import Runner
from tandem_worker.service.metrics import WorkerMetrics
from tandem_worker.service.session import Session
from tandem_worker.service.wire_limits import bounded_plan

logger = logging.getLogger(__name__)

SERVICE_NAME = "tandem.internal.v1.WorkerService"
TAKEOVER_LIMIT_S = 3.0
"""The longest time that a new session waits for the old one's steps. Then it is refused, and the scheduler tries again;
the scheduler waits longer for an answer.
"""
LAST_WORD_GRACE_S = 1.0
"""The longest time that a failed session stays open, for its scheduler to read why."""
MAX_SCHEDULER_ID_CHARACTERS = 256

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


async def _do_nothing() -> None:
    """What run_until_failure() does before the last word of a servicer that has no server."""


class WorkerServicer:
    """Runs one session at a time on a runner."""

    def __init__(self, runner: Runner, *, step_timeout_s: float = STEP_TIMEOUT_S) -> None:
        """A step that makes no progress for step_timeout_s has failed."""
        self._runner = runner
        self._step_timeout_s = step_timeout_s
        self._session: Session | None = None
        self._metrics = WorkerMetrics()
        self._opening = asyncio.Lock()
        self._failure = ""
        self._has_failed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service, with a decoder that refuses plans larger than any for the runner's batch."""
        pb = worker_pb2
        decode = bounded_plan(pb.ExecuteStepsRequest.FromString, self._runner.info)
        handlers: dict[str, Any] = {
            "GetWorkerInfo": grpc.unary_unary_rpc_method_handler(
                self.GetWorkerInfo, pb.GetWorkerInfoRequest.FromString, pb.GetWorkerInfoResponse.SerializeToString
            ),
            "ExecuteSteps": grpc.stream_stream_rpc_method_handler(
                self.ExecuteSteps, decode, pb.ExecuteStepsResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))

    async def GetWorkerInfo(
        self, request: worker_pb2.GetWorkerInfoRequest, context: Context
    ) -> worker_pb2.GetWorkerInfoResponse:
        return encode_info(self._runner.info)

    async def ExecuteSteps(
        self, request_iterator: AsyncIterator[worker_pb2.ExecuteStepsRequest], context: Context
    ) -> AsyncIterator[worker_pb2.ExecuteStepsResponse]:
        async for first in request_iterator:
            if first.WhichOneof("kind") != "open":
                raise UnexpectedMessage("a session's first message opens it")
            session = await self._open(first.open)
            break
        else:
            return
        reader = asyncio.create_task(_read_plans(request_iterator, session))
        try:
            yield worker_pb2.ExecuteStepsResponse(opened=worker_pb2.SessionOpened())
            async for result in session.news():
                if result is None:
                    yield worker_pb2.ExecuteStepsResponse(progress=worker_pb2.Progress())
                else:
                    yield worker_pb2.ExecuteStepsResponse(result=encode_result(result))
        except TandemError as error:
            yield worker_pb2.ExecuteStepsResponse(last_word=status_of(error).SerializeToString())
            # The scheduler reads the last word, and leaves.
            await asyncio.wait([reader], timeout=LAST_WORD_GRACE_S)
            raise
        finally:
            reader.cancel()
            session.end(None)
            logger.info("session of scheduler %s, epoch %d ended", session.scheduler_id, session.epoch)

    def read_metrics(self, prefix: str) -> Samples:
        """The metrics of now. To be called in the event loop."""
        session = self._session
        num_waiting = session.num_waiting if session is not None and session.is_live else None
        return self._metrics.read(prefix, self._runner.info, num_waiting)

    async def run_until_failure(self, before_last_word: Callable[[], Awaitable[None]] = _do_nothing) -> str:
        """Waits for a step to fail; gives the reason why the worker must end.

        The session gets it as its last word, after before_last_word.
        """
        self._loop = asyncio.get_running_loop()
        await self._has_failed.wait()
        await before_last_word()
        if self._session is not None:
            self._session.end(WorkerFailed(self._failure))
        return self._failure

    def fail(self, reason: str) -> None:
        """Notes why the worker must end: a step has failed, or something without which none can run."""
        if not self._has_failed.is_set():
            self._failure = reason
            self._has_failed.set()

    def fail_from_thread(self, reason: str) -> None:
        """Like fail(), from another thread than the event loop's. Without a loop there is no session to tell."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.fail, reason)

    async def close(self, timeout_s: float) -> bool:
        """Ends the session, if there is one, and waits for its steps that have begun. True if they end within
        timeout_s, in seconds.
        """
        if self._session is None:
            return True
        self._session.end(None)
        return await asyncio.to_thread(self._session.join, timeout_s)

    async def _open(self, request: worker_pb2.OpenSession) -> Session:
        if request.protocol_version != PROTOCOL_VERSION:
            raise SessionRefused(f"protocol version {request.protocol_version}; this worker speaks {PROTOCOL_VERSION}")
        instance_id = self._runner.info.worker_instance_id
        if request.worker_instance_id != instance_id:
            raise SessionRefused(f"this worker's instance is {instance_id!r}, another is asked for")
        if not 1 <= len(request.scheduler_id) <= MAX_SCHEDULER_ID_CHARACTERS or not request.scheduler_id.isprintable():
            # The id is written to the log.
            problem = f"must have 1 to {MAX_SCHEDULER_ID_CHARACTERS} printable characters"
            raise InvalidRequest(FieldViolation("open.scheduler_id", problem))
        async with self._opening:
            if self._has_failed.is_set():
                raise WorkerFailed(self._failure)
            if self._session is not None:
                await self._end_for(request, self._session)
            try:
                self._runner.reset()
            except Exception as error:
                self.fail(f"the batch can't be emptied: {error!r}")
                raise
            self._session = Session(
                self._runner,
                request.scheduler_id,
                request.session_epoch,
                step_timeout_s=self._step_timeout_s,
                on_failure=self.fail,
                on_result=self._metrics.note_step,
            )
        self._metrics.note_session()
        logger.info("session of scheduler %s, epoch %d opened", request.scheduler_id, request.session_epoch)
        return self._session

    async def _end_for(self, request: worker_pb2.OpenSession, old: Session) -> None:
        """Ends the old session for the next one. Raises SessionTaken where the old one stays.

        While the old one is live, the same scheduler takes over by a newer epoch only, and another scheduler only if it
        has sequences that wait for the worker and the old one has sent no plan yet. The epoch of a session that is no
        longer live does not count. No error tells one scheduler's id to another, which could take the session with it.
        """
        if old.is_live and old.scheduler_id == request.scheduler_id:
            if request.session_epoch <= old.epoch:
                raise SessionTaken(f"session epoch {request.session_epoch} is not newer than {old.epoch}")
        elif old.is_live and (old.has_plans or not request.num_live_sequences):
            raise SessionTaken("another scheduler holds the session")
        is_same = old.scheduler_id == request.scheduler_id
        old.end(SessionTaken(f"{'a newer epoch' if is_same else 'another scheduler'} took over"))
        if not await asyncio.to_thread(old.join, TAKEOVER_LIMIT_S):
            raise SessionTaken(f"a step of epoch {old.epoch} has not ended in {TAKEOVER_LIMIT_S:.0f} s")


async def _read_plans(requests: AsyncIterator[worker_pb2.ExecuteStepsRequest], session: Session) -> None:
    try:
        async for request in requests:
            if request.WhichOneof("kind") != "plan":
                raise UnexpectedMessage("a session is opened once, and only plans follow")
            session.submit(decode_plan(request.plan), time.time_ns())
        session.end(None)
    except Exception as error:
        session.end(error)
        async for _ in requests:
            # The scheduler's plans that were still under way are dropped.
            pass
