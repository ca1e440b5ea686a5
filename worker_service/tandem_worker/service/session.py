"""One session with a scheduler: the threads that run its plans in order, and the watch over them. Knows no torch.

The launcher thread applies plans and queues their work on the device; the completer thread waits for the results. So
the device has the next plan queued while a result is on its way. Everything else runs in the event loop.

A worker fails by stopping. A plan that the batch cannot follow ends the session, with nothing applied, and the worker
takes the next session. Anything else that goes wrong while a step runs, such as a CUDA error, a bug or a step without
progress, leaves a process that may be broken: `on_failure` is called with the reason, and the process must end.
"""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from tandem_shared.errors import InvalidPlan, UnexpectedMessage
from tandem_shared.step_plan import StepPlan, StepResult
from tandem_worker.runners.runner import PendingStep, Runner

logger = logging.getLogger(__name__)

MAX_PLANS_WAITING = 16
"""The most plans without a result that a session may have. Our scheduler has at most four in flight."""
MAX_PROGRESS_INTERVAL_S = 1.0
"""The longest time between two looks at whether a step has made progress."""


@dataclass(frozen=True, slots=True)
class _End:
    """The end of the session's news, and the error that it ends with, if any."""

    error: Exception | None


class Session:
    """One scheduler's stream of plans."""

    def __init__(
        self,
        runner: Runner,
        scheduler_id: str,
        epoch: int,
        *,
        step_timeout_s: float,
        on_failure: Callable[[str], None],
        on_result: Callable[[StepResult], None] = lambda result: None,
    ) -> None:
        """step_timeout_s: a step without progress for so long has failed. on_failure is called with the reason, and
        on_result with each step's result, in the event loop.
        """
        self.scheduler_id = scheduler_id
        self.epoch = epoch
        self.is_live = True
        self.has_plans = False
        self._runner = runner
        self._step_timeout_s = step_timeout_s
        self._on_failure = on_failure
        self._on_result = on_result
        self._loop = asyncio.get_running_loop()
        self._plans: queue.SimpleQueue[tuple[StepPlan, int] | None] = queue.SimpleQueue()
        self._pending: queue.SimpleQueue[tuple[PendingStep, int] | None] = queue.SimpleQueue()
        # None stands for progress.
        self._news: asyncio.Queue[StepResult | _End | None] = asyncio.Queue()
        # The numbers of plans received and of results given, and when a step last made progress.
        self._num_received = self._num_answered = 0
        self._last_progress_at = time.monotonic()
        self._watch = asyncio.create_task(self._watch_steps())
        self._threads = [
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True)
            for target in (self._launch, self._complete)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """Plans that have come and have no result yet."""
        return self._num_received - self._num_answered

    def submit(self, plan: StepPlan, received_ns: int) -> None:
        """Queues a plan, received at the time received_ns. Raises UnexpectedMessage where too many wait for results."""
        if not self.is_live:
            return
        if self.num_waiting >= MAX_PLANS_WAITING:
            raise UnexpectedMessage(f"more than {MAX_PLANS_WAITING} plans wait for their results")
        if self._num_received == self._num_answered:
            self._last_progress_at = time.monotonic()
        self.has_plans = True
        self._num_received += 1
        self._plans.put((plan, received_ns))

    def end(self, error: Exception | None) -> None:
        """Ends the session: news() ends, or raises the error. Plans that have not begun are dropped; steps that have
        begun run to their end, and their results are dropped.
        """
        if self.is_live:
            self.is_live = False
            if self._num_answered == self._num_received:
                self._last_progress_at = time.monotonic()
            self._plans.put(None)
            self._news.put_nowait(_End(error))

    def join(self, timeout_s: float) -> bool:
        """Waits for the steps that have begun. True if they end within timeout_s, in seconds."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    async def news(self) -> AsyncIterator[StepResult | None]:
        """The results in order, and None where the oldest step has made progress. Ends with the session, or raises its
        error.
        """
        while not isinstance(item := await self._news.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    async def _watch_steps(self) -> None:
        """Tells the scheduler of a step's progress, and the process of a step that makes none. Goes on after the
        session's end while a step runs, as one that hangs keeps the next session from starting.
        """
        interval_s = min(MAX_PROGRESS_INTERVAL_S, self._step_timeout_s / 10)
        progress = self._runner.progress
        while self.is_live or any(thread.is_alive() for thread in self._threads):
            await asyncio.sleep(interval_s)
            if self.is_live and self._num_answered == self._num_received:
                continue
            if progress != (progress := self._runner.progress):
                self._last_progress_at = time.monotonic()
                self._news.put_nowait(None)
            stalled_s = time.monotonic() - self._last_progress_at
            if stalled_s > self._step_timeout_s:
                self._on_failure(
                    f"step {self._num_answered + 1} has made no progress for {stalled_s:.1f} s; --step-timeout-s is "
                    f"{self._step_timeout_s:g}"
                )
                return

    def _launch(self) -> None:
        next_step_id = 1
        try:
            while (item := self._plans.get()) is not None and self.is_live:
                plan, received_ns = item
                if plan.step_id != next_step_id:
                    raise InvalidPlan(f"step_id is {plan.step_id}, must be {next_step_id}")
                next_step_id += 1
                self._pending.put((self._runner.execute(plan), received_ns))
        except InvalidPlan as error:
            self._tell(self.end, error)
        except BaseException as error:
            self._tell_failure(next_step_id - 1, error)
        finally:
            self._pending.put(None)

    def _complete(self) -> None:
        step_id = 0
        try:
            while (item := self._pending.get()) is not None:
                pending, received_ns = item
                step_id += 1
                result = pending.wait()
                times = dataclasses.replace(result.times, received_ns=received_ns, sent_ns=time.time_ns())
                self._tell(self._deliver, dataclasses.replace(result, times=times))
        except BaseException as error:
            self._tell_failure(step_id, error)

    def _tell_failure(self, step_id: int, error: BaseException) -> None:
        """Logs a failed step and has the process end, even if the session has ended by now."""
        logger.critical("step %d failed", step_id, exc_info=error)
        self._tell(self._on_failure, f"step {step_id} failed: {error!r}")

    def _tell(self, callback: Callable[[Any], None], news: Any) -> None:
        """Has the event loop call back. A closed loop, whose process is ending, is not told."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, news)

    def _deliver(self, result: StepResult) -> None:
        self._num_answered += 1
        self._last_progress_at = time.monotonic()
        self._on_result(result)
        if self.is_live:
            self._news.put_nowait(result)
