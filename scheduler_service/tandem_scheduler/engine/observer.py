"""What an observer of the engine is told: plain data on steps, the worker and requests, as it happens.

An observer is called in the event loop's thread, so it must be quick, and it decides nothing: whatever it raises ends
in guarded(). It has its own clock, and looks at Scheduler.load() for what is a state and not an event.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tandem_scheduler.core.types import FinishReason, StepOutputs
from tandem_scheduler.engine_interface import RequestOutcome, TraceContext
from tandem_shared.errors import TandemError
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import StepPlan, StepResult, WorkerInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlanMade:
    """A plan that is about to be sent."""

    plan: StepPlan
    num_prompt_tokens: int
    """Tokens of its chunks."""
    num_decoding_rows: int
    """Each of them computes one token more."""
    num_preempted: int
    """Sequences that lost their rows for it."""
    num_in_flight: int
    """Plans under way, this one included."""
    made_at: float
    """When it was made, in seconds of time.monotonic()."""


@dataclass(frozen=True, slots=True)
class PlanSent:
    """A plan that is on its way. Its result may have come before this."""

    plan: PlanMade
    num_bytes: int
    """The size of its message."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step's result, which has its StepTimes, and what the scheduler made of it."""

    plan: PlanMade
    result: StepResult
    outputs: StepOutputs
    received_at: float
    """When the result came, in seconds of time.monotonic()."""
    step_s: float
    """How long the worker was at the step, in seconds: without the time in which the plan waited for the step before.
    """

    @property
    def wire_s(self) -> float:
        """Seconds between plan and result in which the worker had neither: encoding, both ways, and decoding. The
        worker's clock may be another, so only differences of its times count. It may be set meanwhile, so this is never
        negative, nor more than all of that time.
        """
        times, round_trip_s = self.result.times, self.received_at - self.plan.made_at
        return min(max(round_trip_s - (times.sent_ns - times.received_ns) / 1e9, 0.0), round_trip_s)


@dataclass(frozen=True, slots=True)
class WorkerAttached:
    """A session with a worker has begun."""

    worker: WorkerInfo
    epoch: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The session with that epoch has ended. Every sequence was preempted."""

    epoch: int
    reason: str
    num_live_sequences: int


@dataclass(frozen=True, slots=True)
class RequestSubmitted:
    """A request that was taken. Its choices are the sequences from first_sequence_id on, in their order."""

    request_id: str
    first_sequence_id: int
    num_choices: int
    num_prompt_tokens: int
    max_tokens: int
    """The most output tokens of each choice."""
    sampling: RowSampling
    """That of choice 0."""
    trace: TraceContext | None = None

    @property
    def sequence_ids(self) -> range:
        return range(self.first_sequence_id, self.first_sequence_id + self.num_choices)


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """A request that passed the front end's checks, and that the engine refused."""

    request_id: str
    error: TandemError


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first output token of any of a request's choices."""

    request: RequestSubmitted


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """The last of a request's choices has ended, or its front end has closed it, as when a client cancels its call."""

    request: RequestSubmitted
    reasons: tuple[FinishReason, ...]
    """One for each choice, in their order. ABORT for those that an operator or the front end ended."""
    num_output_tokens: int
    """Output tokens of all choices. Tokens past a stop string count here, as the front end cuts them off later."""
    num_cached_tokens: int
    """Prompt tokens that the prefix cache had, of all choices."""
    error: TandemError | None


@dataclass(frozen=True, slots=True)
class RequestClosed:
    """The call of a request is over. This comes after RequestEnded, once for each request that was submitted."""

    ended: RequestEnded
    outcome: RequestOutcome | None
    """What its front end says of it. None if the front end has gone without a word of it."""


Event: TypeAlias = (
    PlanMade
    | PlanSent
    | StepDone
    | WorkerAttached
    | WorkerLost
    | RequestSubmitted
    | RequestRefused
    | FirstToken
    | RequestEnded
    | RequestClosed
)

Observer = Callable[[Event], None]
"""Takes the events that it knows and ignores the others."""


def guarded(observer: Observer) -> Observer:
    """The observer, whose exceptions end here. The first at each kind of event is logged, the others are not: an
    observer that fails at every step would fill the log, and writing it would hold up the steps.
    """
    failed_at: set[type[Event]] = set()

    def tell(event: Event) -> None:
        try:
            observer(event)
        except Exception:
            if type(event) not in failed_at:
                failed_at.add(type(event))
                logger.exception("an observer failed at %s; its later failures there are silent", type(event).__name__)

    return tell


def all_of(*observers: Observer) -> Observer:
    """One observer that tells several. One that fails does not keep the news from the others."""
    guards = [guarded(observer) for observer in observers]

    def tell(event: Event) -> None:
        for observe in guards:
            observe(event)

    return tell
