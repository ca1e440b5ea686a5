"""The sole caller of the scheduler core: plans go to the worker, results come back, with some plans in flight.

Knows the core and the worker's interface; of the front ends it knows only a sink that takes each step's outputs as one
batch of plain data. When the worker is lost, the loop waits for one with the same fingerprint and goes on; no step is
ever retried.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from tandem_scheduler.core.interface import SchedulerInterface
from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import FinishedSequence, SchedulerConfig, SequenceRequest, StepOutputs
from tandem_scheduler.engine.chunk_pace import ChunkPace
from tandem_scheduler.engine.observer import Observer, PlanMade, PlanSent, StepDone, WorkerAttached, WorkerLost, guarded
from tandem_scheduler.engine.step_sums import StepMeter, StepSums
from tandem_scheduler.engine.waiting_log import WaitingLog
from tandem_scheduler.engine.worker_client import CONNECT_TIMEOUT_S, WorkerClient, WorkerSession
from tandem_shared.errors import DeadlinePassed, InvalidPlan, SessionTaken, WorkerFailed, WorkerUnavailable
from tandem_shared.step_plan import StepPlan, StepTimes, WorkerInfo

logger = logging.getLogger(__name__)

LAST_WORD_WAIT_S = 0.5
MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0

CreateScheduler = Callable[[SchedulerConfig, WorkerInfo], SchedulerInterface]
CheckWorker = Callable[[WorkerInfo], str]
"""Says why a worker must not be used; empty if it may."""


class Sink(Protocol):
    """What the step loop tells the front ends, between steps."""

    def on_outputs(self, outputs: StepOutputs) -> None: ...

    def on_finished(self, finished: list[FinishedSequence]) -> None:
        """Sequences that ended outside a step."""

    def on_outputs_lost(self, sequence_ids: list[int], finished: list[FinishedSequence]) -> None:
        """One of the two above raised, so the streams of these sequences may lack tokens or ends: those that are still
        live here end with an error.
        """

    def on_worker_gone(self, error: WorkerUnavailable) -> None:
        """No worker came back in time: every live sequence has ended."""

    async def on_readiness(self, is_ready: bool) -> None: ...


class StepLoop:
    """Runs one scheduler against one worker address, through losses of the worker. All of it runs in one event loop."""

    def __init__(
        self,
        client: WorkerClient,
        config: SchedulerConfig,
        sink: Sink,
        *,
        scheduler_id: str,
        worker_wait_s: float,
        step_timeout_s: float,
        create_scheduler: CreateScheduler = Scheduler,
        check_worker: CheckWorker = lambda info: "",
        observer: Observer | None = None,
    ) -> None:
        self.scheduler_id = scheduler_id
        self.epoch = 0
        self.scheduler: SchedulerInterface | None = None
        self.worker: WorkerInfo | None = None
        self.is_connected = False
        self._client = client
        self._config = config
        self._sink = sink
        self._worker_wait_s = worker_wait_s
        self._step_timeout_s = step_timeout_s
        self._create_scheduler = create_scheduler
        self._check_worker = check_worker
        self._observe = guarded(observer) if observer is not None else None
        # No worker came back in time, so new sequences are refused until there is one.
        self._has_given_up = False
        self._has_news = asyncio.Event()
        self._sending = asyncio.Lock()
        # The plans under way, oldest first.
        self._sent: deque[PlanMade] = deque()
        self._num_preemptions = 0
        self._pace: ChunkPace | None = None
        self._meter = StepMeter()
        self._result_at = 0.0
        # The pause between sessions that bring no result.
        self._backoff_s = 0.0
        self._waiting_log = WaitingLog(client.address)

    @property
    def step_sums(self) -> StepSums:
        return self._meter.sums

    @property
    def max_num_seqs(self) -> int:
        """The most sequences that may run at once. The worker may have fewer rows."""
        return self._config.max_num_seqs

    @property
    def is_prefix_caching(self) -> bool:
        return self._config.enable_prefix_caching

    def submit(self, requests: Sequence[SequenceRequest]) -> None:
        """Queues sequences, all or none. Raises what Scheduler.add raises, DeadlinePassed and WorkerUnavailable."""
        if self.scheduler is None:
            raise WorkerUnavailable("no worker has been seen yet")
        if self._has_given_up:
            raise WorkerUnavailable("the worker is gone")
        now = time.monotonic()
        if any(request.has_expired(now) for request in requests):
            raise DeadlinePassed("the call's deadline has passed")
        self.scheduler.add(*requests)
        self._has_news.set()

    def abort(self, sequence_id: int) -> FinishedSequence | None:
        return self.scheduler.abort(sequence_id) if self.scheduler else None

    def stop(self, sequence_id: int, num_output_tokens: int) -> FinishedSequence | None:
        return self.scheduler.stop(sequence_id, num_output_tokens) if self.scheduler else None

    def discount(self, num_output_tokens: int) -> None:
        """Counts tokens of a sequence that has ended as overshoot, because they turned out to be past a stop."""
        if self.scheduler:
            self.scheduler.discount(num_output_tokens)

    async def run(self) -> None:
        """Runs until it is cancelled."""
        while True:
            session = await self._connect()
            self._has_given_up = False
            self.is_connected = True
            await self._sink.on_readiness(True)
            failure = reason = ""
            try:
                await self._run_session(session)
            except (WorkerFailed, InvalidPlan) as error:
                failure = reason = str(error)
                logger.warning("worker lost: it said: %s", error)
            except Exception as error:
                # Whatever the error was, the outcome of the steps in flight is unknown.
                reason = str(error)
                is_expected = isinstance(error, WorkerUnavailable)
                logger.warning("worker lost: %s", error, exc_info=None if is_expected else error)
            finally:
                self.is_connected = False
                await session.close()
            await self._sink.on_readiness(False)
            assert self.scheduler is not None
            if self._observe:
                self._observe(WorkerLost(self.epoch, reason, self.scheduler.num_unfinished))
            self._tell_finished(self.scheduler.lose_worker(failure))
            # A worker that fails whatever it is given must not be tried in a tight loop.
            self._backoff_s = 0.0 if self._result_at else min(max(2 * self._backoff_s, MIN_BACKOFF_S), MAX_BACKOFF_S)
            await asyncio.sleep(self._backoff_s)

    async def _connect(self) -> WorkerSession:
        """Tries until it has a session with the right worker. After worker_wait_s it gives up on the live sequences,
        but not on the worker.
        """
        deadline, backoff = time.monotonic() + self._worker_wait_s, MIN_BACKOFF_S
        while True:
            may_give_up = self.scheduler is not None and not self._has_given_up
            # A worker that hangs must not delay the moment of giving up.
            left_s = max(deadline - time.monotonic(), MIN_BACKOFF_S) if may_give_up else CONNECT_TIMEOUT_S
            timeout_s = min(left_s, CONNECT_TIMEOUT_S)
            try:
                return await self._try_connect(timeout_s)
            except (WorkerUnavailable, SessionTaken) as error:
                self._waiting_log.say(str(error))
                if may_give_up and time.monotonic() >= deadline:
                    self._give_up(WorkerUnavailable(f"no worker came back in {self._worker_wait_s:g} s: {error}"))
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_S)

    async def _try_connect(self, timeout_s: float) -> WorkerSession:
        info = await self._client.get_info(timeout_s)
        if problem := self._check_worker(info) or self._why_not_needed(info):
            raise WorkerUnavailable(problem)
        self.epoch += 1
        num_live = self.scheduler.num_unfinished if self.scheduler is not None else 0
        session = await self._client.open_session(info, self.scheduler_id, self.epoch, num_live)
        if problem := self._why_not_needed(info):
            # A request came while the session was opened.
            await session.close()
            raise WorkerUnavailable(problem)
        self._waiting_log.end()
        self._pace = ChunkPace(info.max_num_batched_tokens, info.device)
        logger.info("session %d with worker %s, %s", self.epoch, info.worker_instance_id, info.model)
        self.worker = info
        if self.scheduler is None:
            self.scheduler = self._create_scheduler(self._config, info)
        else:
            self._tell_finished(self.scheduler.attach_worker(info))
        if self._observe:
            self._observe(WorkerAttached(info, self.epoch))
        return session

    def _why_not_needed(self, info: WorkerInfo) -> str:
        """Why a worker is of no use: live sequences cannot go on with another model."""
        is_same = self.worker is None or info.fingerprint == self.worker.fingerprint
        if is_same or self.scheduler is None or not self.scheduler.num_unfinished:
            return ""
        return f"live requests wait for their model, and the worker has another one: fingerprint {info.fingerprint}"

    def _give_up(self, error: WorkerUnavailable) -> None:
        self._has_given_up = True
        logger.error("%s", error)
        self._sink.on_worker_gone(error)

    async def _run_session(self, session: WorkerSession) -> None:
        """Runs until the worker is lost, and raises the reason."""
        self._sent.clear()
        self._result_at = 0.0
        self._meter.start_session()
        self._has_news.set()
        parts: list[Coroutine[Any, Any, None]] = [
            self._receive(session),
            self._send_on_news(session),
            self._watch(session),
        ]
        receiving, *_ = tasks = [asyncio.create_task(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # Another part may have failed only because the session was ending. The reason comes with the results.
            await asyncio.wait([receiving], timeout=LAST_WORD_WAIT_S)
            first = receiving if receiving.done() else done.pop()
            first.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, session: WorkerSession) -> None:
        assert self.scheduler is not None
        async for result in session.results():
            outputs = self.scheduler.update(result)
            plan = self._sent.popleft()
            step_s = self._note_result(plan, result.times)
            # The front ends come first, with no await in between, so that none can close a sequence that these outputs
            # name. The worker has other plans meanwhile, and a stop that a front end finds here is in the next one.
            self._tell_outputs(outputs)
            if self._observe:
                self._observe(StepDone(plan, result, outputs, self._result_at, step_s))
            await self._send_plans(session)

    def _tell_outputs(self, outputs: StepOutputs) -> None:
        """Gives the sink a step's outputs. If it raises, that is no fault of the worker, and the core has already
        confirmed the outputs.
        """
        try:
            self._sink.on_outputs(outputs)
        except Exception:
            logger.exception("outputs that could not be handed on")
            reported = [sequence_id for sequence_id, _ in outputs.prompt_logprobs]
            self._sink.on_outputs_lost([*outputs.sequence_ids, *reported], outputs.finished)

    def _tell_finished(self, finished: list[FinishedSequence]) -> None:
        try:
            self._sink.on_finished(finished)
        except Exception:
            logger.exception("ends that could not be handed on")
            self._sink.on_outputs_lost([], finished)

    async def _send_on_news(self, session: WorkerSession) -> None:
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            await self._send_plans(session)

    async def _send_plans(self, session: WorkerSession) -> None:
        async with self._sending:
            while (plan := self._next_plan()) is not None:
                made = self._note_plan(plan)
                num_bytes = await session.send(plan)
                if self._observe:
                    self._observe(PlanSent(made, num_bytes))

    def _next_plan(self) -> StepPlan | None:
        """The next plan, after the sequences whose deadlines passed while they waited have ended."""
        assert self.scheduler is not None and self._pace is not None
        if expired := self.scheduler.expire(time.monotonic()):
            self._tell_finished(expired)
        return self.scheduler.schedule(self._pace.limit)

    def _note_plan(self, plan: StepPlan) -> PlanMade:
        assert self.scheduler is not None
        num_preemptions = self.scheduler.counters.num_preemptions
        made = PlanMade(
            plan,
            num_prompt_tokens=int(plan.chunk_num_tokens.sum()),
            num_decoding_rows=self.scheduler.num_decoding_rows,
            num_preempted=num_preemptions - self._num_preemptions,
            num_in_flight=len(self._sent) + 1,
            made_at=time.monotonic(),
        )
        self._num_preemptions = num_preemptions
        self._sent.append(made)
        if self._observe:
            self._observe(made)
        return made

    def _note_result(self, plan: PlanMade, times: StepTimes) -> float:
        """Returns how long the worker was at the step, in seconds."""
        assert self._pace is not None
        now = time.monotonic()
        # The step may have waited for the one before it.
        self._pace.note(plan.num_prompt_tokens, now - max(plan.made_at, self._result_at))
        self._result_at = now
        return self._meter.note(times, round(1e9 * (now - plan.made_at)), is_queued=plan.num_in_flight > 1) / 1e9

    async def _watch(self, session: WorkerSession) -> None:
        """Raises WorkerUnavailable when the oldest step has brought neither a result nor progress for too long."""
        while True:
            await asyncio.sleep(self._step_timeout_s / 10)
            if not self._sent:
                continue
            oldest = self._sent[0]
            silent_s = time.monotonic() - max(oldest.made_at, session.heard_at)
            if silent_s > self._step_timeout_s:
                raise WorkerUnavailable(
                    f"no word of step {oldest.plan.step_id} for {silent_s:.1f} s; --step-timeout-s is "
                    f"{self._step_timeout_s:g}"
                )
