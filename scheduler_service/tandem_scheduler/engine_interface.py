"""The engine as a front end sees it, and what it tells a front end. All of it is plain data, as the two may be two
processes.

The interface has two implementations: engine/hub.py in the engine's own process, and
processes/front_end_side/remote_engine.py behind a stream.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from tandem_scheduler.core.types import FinishReason, SequenceRequest
from tandem_shared.errors import SequenceFailed, TandemError
from tandem_shared.metrics.histogram import Histogram
from tandem_shared.step_plan import PromptLogprobs, RowLogprobs, WorkerInfo

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""How often the two ends of a stream say that they are alive."""

TOKEN_GAP_BUCKETS_S = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4),
    *(0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
"""vLLM's, and smaller ones, as a small model's tokens come every few milliseconds."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """worker is the last one that was seen; is_ready says whether it is there now."""

    worker: WorkerInfo | None = None
    is_ready: bool = False
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """The end of one sequence. If it has an error, the whole request ends with it."""

    handle: int
    reason: FinishReason
    num_cached_tokens: int
    stop_token_id: int | None = None
    error: TandemError | None = None


@dataclass(slots=True)
class OutputBatch:
    """The outputs of one step or several for one front end: parallel lists of handles and tokens; log-probability
    reports for the sequences that asked for them, in the same order; then the ends. A stop token is the last token
    before its end. prompt_logprobs has the reports on prompt tokens, by handle: those of a sequence follow each other
    without gaps, and come before its first token or with it.
    """

    token_handles: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, RowLogprobs]] = field(default_factory=list)
    ends: list[SequenceEnd] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, PromptLogprobs]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.token_handles or self.ends or self.prompt_logprobs)

    @property
    def handles(self) -> list[int]:
        """The handles of all sequences in the batch. Some occur more than once."""
        reported = [handle for handle, _ in (*self.prompt_logprobs, *self.logprobs)]
        return [*self.token_handles, *reported, *(end.handle for end in self.ends)]

    def extend(self, later: "OutputBatch") -> None:
        self.token_handles += later.token_handles
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.ends += later.ends
        self.prompt_logprobs += later.prompt_logprobs


@dataclass(frozen=True, slots=True)
class TraceContext:
    """What a call's span needs to know of the call."""

    rpc: str
    """Service and method, such as tandem.v1.InferenceService/GenerateStream."""
    traceparent: str = ""
    tracestate: str = ""
    """W3C's headers as the client sent them. Empty if it sent none."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A request's sequences, which differ in their choice index alone. Choice i has the handle first_handle + i."""

    request_id: str
    first_handle: int
    first: SequenceRequest
    """Choice 0. The engine replaces its sequence id."""
    num_choices: int
    fingerprint: str
    """The fingerprint of the worker that the request was checked against. With another model it has to be checked
    again."""
    trace: TraceContext | None = None
    """None if there are no traces."""


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """What a request's client got, as its front end knows it. Times are seconds of time.monotonic(), which all
    processes of a host share; reasons and num_output_tokens have an element for each choice, in their order.
    """

    arrived_at: float
    """When the call came, before the request was checked."""
    first_token_at: float | None
    """When the first token of any choice came. None if none did."""
    ended_at: float
    """When the last choice ended, or the call."""
    reasons: tuple[FinishReason, ...]
    """ABORT for choices that had not ended when the call did."""
    num_output_tokens: tuple[int, ...]
    """Without tokens past a stop string."""


@dataclass(slots=True)
class FrontEndStats:
    """What a front end counts that belongs to no request that the engine knows."""

    token_gaps: Histogram = field(default_factory=lambda: Histogram(TOKEN_GAP_BUCKETS_S))
    """The seconds between a choice's token and its token before."""
    num_refused: Counter[str] = field(default_factory=Counter)
    """Requests that were refused, by the reason in the error's details, such as QUEUE_FULL."""

    def __bool__(self) -> bool:
        return bool(self.num_refused) or any(self.token_gaps.counts)

    def add(self, other: "FrontEndStats") -> None:
        self.token_gaps.add(other.token_gaps)
        self.num_refused += other.num_refused


class Engine(Protocol):
    """What a front end may ask of the engine. It chooses the handles that name its sequences, and never reuses one."""

    @property
    def state(self) -> EngineState: ...

    @property
    def load_report(self) -> bytes:
        """The engine's load, a second old at most, as an encoded OrcaLoadReport. Empty if clients are not told."""

    async def submit(self, submission: "Submission") -> None:
        """Queues a request's sequences, all or none.

        Raises Draining, RequestIdInUse, InvalidRequest, QueueFull, DeadlinePassed and WorkerUnavailable. Outputs may
        come before it returns.
        """

    def stop(self, handle: int, num_output_tokens: int) -> None:
        """Ends a sequence because its output token number num_output_tokens completed a stop string. Tokens past it
        don't count. The sequence's end comes as any other, if it has not come yet.
        """

    def close_request(self, first_handle: int, outcome: RequestOutcome | None = None) -> None:
        """Forgets a request. Those of its sequences that still run are aborted; their blocks are free for the next
        plan. outcome: what came of it, None if it was refused.
        """


class EngineListener(Protocol):
    """What an engine tells a front end."""

    def on_outputs(self, batch: OutputBatch) -> None:
        """May be called from within Engine.stop()."""

    async def on_state(self, state: EngineState) -> None: ...

    def take_stats(self) -> FrontEndStats:
        """What the front end has counted since the last call."""


def hand_on(listener: EngineListener, batch: OutputBatch) -> list[int]:
    """Gives a listener its outputs. If it raises, all requests in the batch end with an error, as their streams would
    lack tokens. Returns the handles of those requests' sequences, and raises nothing.
    """
    try:
        listener.on_outputs(batch)
    except Exception:
        logger.exception("outputs that the front end could not take")
        return fail_outputs(listener, batch.handles)
    return []


def failed_outputs(handles: Iterable[int], error: TandemError) -> list[OutputBatch]:
    """Batches that stand in for outputs that could not be handed on: each ends the request of one sequence with an
    error.
    """
    return [
        OutputBatch(ends=[SequenceEnd(handle, FinishReason.ERROR, 0, error=error)]) for handle in dict.fromkeys(handles)
    ]


def fail_outputs(listener: EngineListener, handles: Iterable[int]) -> list[int]:
    """Ends the requests of these sequences with an error, one by one. Returns the handles, each once."""
    failed = list(dict.fromkeys(handles))
    for batch in failed_outputs(failed, SequenceFailed("its outputs could not be taken by the front end")):
        try:
            listener.on_outputs(batch)
        except Exception:
            logger.exception("a request that the front end could not end")
    return failed


async def tell_state(listener: EngineListener, state: EngineState) -> None:
    """Tells a listener the engine's state. One that raises goes on with the state that it knew."""
    try:
        await listener.on_state(state)
    except Exception:
        logger.exception("the front end could not take the engine's state")
