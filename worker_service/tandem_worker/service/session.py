"""One session with a scheduler: the threads that run its plans in order, and the watch over them. Knows no torch.

The launcher thread applies plans and queues their work on the device, the completer thread waits for the results, so
the device always has the next plan queued while a result is on its way. All else is the event loop's.

A worker fails by stopping. A plan that the batch cannot follow ends the session, with nothing applied, and the worker
takes the next one. Whatever else goes wrong while a step runs leaves a process that may be broken: a CUDA error, a bug,
a step that gets on with nothing. Then `on_failure` hears why, and the process must end.
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
"""Plans that a scheduler may send ahead; no more than four are ever in flight."""
MAX_PROGRESS_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class _End:
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
    ) -> None:
        """on_failure is called at most once, in the event loop; fail() then gives the session its last word."""
        self.scheduler_id = scheduler_id
        self.epoch = epoch
        self.is_live = True
        self.has_plans = False
        self._runner = runner
        self._step_timeout_s = step_timeout_s
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._plans: queue.SimpleQueue[tuple[StepPlan, int] | None] = queue.SimpleQueue()
        self._pending: queue.SimpleQueue[tuple[PendingStep, int] | None] = queue.SimpleQueue()
        # None is progress, _End the end.
        self._news: asyncio.Queue[StepResult | _End | None] = asyncio.Queue()
        # Plans that came and results that left, and when a step last got on.
        self._num_received = self._num_answered = 0
        self._got_on_at = time.monotonic()
        self._watch = asyncio.create_task(self._watch_steps())
        self._threads = [
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True)
            for target in (self._launch, self._complete)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, plan: StepPlan, received_ns: int) -> None:
        """Raises UnexpectedMessage where the scheduler sends plans without waiting for results."""
        if not self.is_live:
            return
        if self._num_received - self._num_answered >= MAX_PLANS_WAITING:
            raise UnexpectedMessage(f"more than {MAX_PLANS_WAITING} plans wait for their results")
        if self._num_received == self._num_answered:
            self._got_on_at = time.monotonic()
        self.has_plans = True
        self._num_received += 1
        self._plans.put((plan, received_ns))

    def end(self, error: Exception | None) -> None:
        """Drops plans that have not started. Steps that have begun run to their end, and nobody hears their results."""
        if self.is_live:
            self.is_live = False
            if self._num_answered == self._num_received:
                self._got_on_at = time.monotonic()
            self._plans.put(None)
            self._news.put_nowait(_End(error))

    def join(self, timeout_s: float) -> bool:
        """Waits so long for the steps that have begun. Whether they have ended."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    async def news(self) -> AsyncIterator[StepResult | None]:
        """Results in order, and None where the oldest step gets on; ends with the session, or raises its error."""
        while not isinstance(item := await self._news.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    async def _watch_steps(self) -> None:
        """Tells the scheduler of steps that get on, and the process of one that does not. Goes on after the session's
        end, as what hangs then keeps the next session away.
        """
        interval_s = min(MAX_PROGRESS_INTERVAL_S, self._step_timeout_s / 10)
        progress = self._runner.progress
        while self.is_live or any(thread.is_alive() for thread in self._threads):
            await asyncio.sleep(interval_s)
            if self.is_live and self._num_answered == self._num_received:
                continue
            if progress != (progress := self._runner.progress):
                self._got_on_at = time.monotonic()
                self._news.put_nowait(None)
            stalled_s = time.monotonic() - self._got_on_at
            if stalled_s > self._step_timeout_s:
                self._on_failure(
                    f"step {self._num_answered + 1} has not got on for {stalled_s:.1f} s; --step-timeout-s is "
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
        """The process must end, even if the session has ended by now."""
        logger.critical("step %d failed", step_id, exc_info=error)
        self._tell(self._on_failure, f"step {step_id} failed: {error!r}")

    def _tell(self, callback: Callable[[Any], None], news: Any) -> None:
        """From a thread to the loop, which may be closed: then the process is ending."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, news)

    def _deliver(self, result: StepResult) -> None:
        self._num_answered += 1
        self._got_on_at = time.monotonic()
        if self.is_live:
            self._news.put_nowait(result)
