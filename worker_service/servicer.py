"""The worker's side of the step protocol: sessions, fencing, order. Knows no torch: a Runner does the work.

Threads: gRPC lives in the asyncio loop. Each session has a launcher thread, which applies plans in order and queues
their work on the device, and a completer thread, which waits for the results; so the device always has the next
plan queued while a result is on its way.
"""

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import grpc

from shared.errors import InvalidPlan, ProtocolError, SessionRefused, SessionTaken
from shared.step_codec import PROTOCOL_VERSION, decode_plan, encode_info, encode_result
from shared.step_plan import StepPlan, StepResult
from tandem.v1 import worker_pb2, worker_pb2_grpc
from worker_service.runner import PendingStep, Runner

logger = logging.getLogger(__name__)

SERVICE_NAME = "tandem.v1.WorkerService"
TAKEOVER_LIMIT_S = 10.0
"""That a new session waits for the old one's steps. Then it is refused, and the scheduler comes again."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Runs one session at a time on a runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._session: _Session | None = None
        self._opening = asyncio.Lock()

    async def GetWorkerInfo(
        self, request: worker_pb2.GetWorkerInfoRequest, context: Context
    ) -> worker_pb2.GetWorkerInfoResponse:
        return encode_info(self._runner.info)

    async def ExecuteSteps(
        self, request_iterator: AsyncIterator[worker_pb2.ExecuteStepsRequest], context: Context
    ) -> AsyncIterator[worker_pb2.ExecuteStepsResponse]:
        async for first in request_iterator:
            if first.WhichOneof("kind") != "open":
                raise ProtocolError("a session's first message opens it")
            session = await self._open(first.open)
            break
        else:
            return
        reader = asyncio.create_task(_read_plans(request_iterator, session))
        try:
            yield worker_pb2.ExecuteStepsResponse(opened=worker_pb2.SessionOpened())
            async for result in session.results():
                yield worker_pb2.ExecuteStepsResponse(result=encode_result(result))
        finally:
            reader.cancel()
            session.end(None)
            logger.info("session of scheduler %s, epoch %d ended", session.scheduler_id, session.epoch)

    async def close(self, timeout_s: float) -> bool:
        """Ends the session, if there is one, and waits so long for steps that have begun. Whether they have ended."""
        if self._session is None:
            return True
        self._session.end(None)
        return await asyncio.to_thread(self._session.join, timeout_s)

    async def _open(self, request: worker_pb2.OpenSession) -> "_Session":
        if request.protocol_version != PROTOCOL_VERSION:
            raise SessionRefused(f"protocol version {request.protocol_version}; this worker speaks {PROTOCOL_VERSION}")
        instance_id = self._runner.info.worker_instance_id
        if request.worker_instance_id != instance_id:
            raise SessionRefused(f"worker instance {request.worker_instance_id!r}; this is {instance_id!r}")
        async with self._opening:
            old = self._session
            if old is not None:
                if old.is_live and old.scheduler_id != request.scheduler_id:
                    raise SessionTaken(f"scheduler {old.scheduler_id!r} holds the session")
                if old.scheduler_id == request.scheduler_id and request.session_epoch <= old.epoch:
                    raise SessionTaken(f"session epoch {request.session_epoch} is not newer than {old.epoch}")
                old.end(SessionTaken(f"epoch {request.session_epoch} took over"))
                if not await asyncio.to_thread(old.join, TAKEOVER_LIMIT_S):
                    raise SessionTaken(f"a step of epoch {old.epoch} has not ended in {TAKEOVER_LIMIT_S:.0f} s")
            self._runner.reset()
            self._session = _Session(self._runner, request.scheduler_id, request.session_epoch)
        logger.info("session of scheduler %s, epoch %d opened", request.scheduler_id, request.session_epoch)
        return self._session


async def _read_plans(requests: AsyncIterator[worker_pb2.ExecuteStepsRequest], session: "_Session") -> None:
    try:
        async for request in requests:
            if request.WhichOneof("kind") != "plan":
                raise ProtocolError("a session is opened once, and only plans follow")
            session.submit(decode_plan(request.plan), time.time_ns())
        session.end(None)
    except Exception as error:
        session.end(error)


class _Session:
    """One scheduler's stream of plans and the threads that run them. All but the threads' work is the loop's."""

    def __init__(self, runner: Runner, scheduler_id: str, epoch: int) -> None:
        self.scheduler_id = scheduler_id
        self.epoch = epoch
        self.is_live = True
        self._runner = runner
        self._loop = asyncio.get_running_loop()
        self._plans: queue.SimpleQueue[tuple[StepPlan, int] | None] = queue.SimpleQueue()
        self._pending: queue.SimpleQueue[tuple[PendingStep, int] | None] = queue.SimpleQueue()
        # None is the end of the stream, an exception its status.
        self._results: asyncio.Queue[StepResult | Exception | None] = asyncio.Queue()
        self._threads = [
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True)
            for target in (self._launch, self._complete)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, plan: StepPlan, received_ns: int) -> None:
        if self.is_live:
            self._plans.put((plan, received_ns))

    def end(self, error: Exception | None) -> None:
        """Drops plans that have not started; those that have run to their end, unheard."""
        if self.is_live:
            self.is_live = False
            self._plans.put(None)
            self._results.put_nowait(error)

    def join(self, timeout_s: float) -> bool:
        """Waits so long for the steps that have begun. Whether they have ended."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    async def results(self) -> AsyncIterator[StepResult]:
        while (item := await self._results.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def _launch(self) -> None:
        next_step_id = 1
        try:
            while (item := self._plans.get()) is not None and self.is_live:
                plan, received_ns = item
                if plan.step_id != next_step_id:
                    raise InvalidPlan(f"step_id is {plan.step_id}, must be {next_step_id}")
                next_step_id += 1
                self._pending.put((self._runner.execute(plan), received_ns))
        except Exception as error:
            self._tell(self.end, error)
        finally:
            self._pending.put(None)

    def _complete(self) -> None:
        try:
            while (item := self._pending.get()) is not None:
                pending, received_ns = item
                result = pending.wait()
                times = dataclasses.replace(result.times, received_ns=received_ns, sent_ns=time.time_ns())
                self._tell(self._deliver, dataclasses.replace(result, times=times))
        except Exception as error:
            self._tell(self.end, error)

    def _tell(self, callback: Callable[[Any], None], news: Any) -> None:
        """From a thread to the loop. An ended session has nobody to tell, and its loop may be closed."""
        if self.is_live:
            self._loop.call_soon_threadsafe(callback, news)

    def _deliver(self, result: StepResult) -> None:
        if self.is_live:
            self._results.put_nowait(result)
