"""The scheduler as a front end sees it, and what it tells a front end. All plain data: the two may be two processes.

Knows neither: engine/hub.py is the engine in its own process, remote_engine.py the one behind a
stream.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from tandem_scheduler.core.types import FinishReason, SequenceRequest
from tandem_shared.errors import SequenceFailed, TandemError
from tandem_shared.step_plan import RowLogprobs, WorkerInfo

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""How often the two ends of a stream say that they are alive."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """worker is the last one seen, is_ready whether it is there now."""

    worker: WorkerInfo | None = None
    is_ready: bool = False
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """error: the whole request ends with it."""

    handle: int
    reason: FinishReason
    num_cached_tokens: int
    stop_token_id: int | None = None
    error: TandemError | None = None


@dataclass(slots=True)
class OutputBatch:
    """What one step or several brought a front end's sequences: parallel lists of handles and tokens, the reports on
    the tokens of those that asked, in the same order, then the ends. A stop token is the last token before its end.
    """

    token_handles: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, RowLogprobs]] = field(default_factory=list)
    ends: list[SequenceEnd] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.token_handles or self.ends)

    @property
    def handles(self) -> list[int]:
        """Of all sequences that it speaks of, some more than once."""
        return [*self.token_handles, *(handle for handle, _ in self.logprobs), *(end.handle for end in self.ends)]

    def extend(self, later: "OutputBatch") -> None:
        self.token_handles += later.token_handles
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.ends += later.ends


@dataclass(frozen=True, slots=True)
class Submission:
    """A request's sequences, which differ in their choice index alone. Choice i has the handle first_handle + i."""

    request_id: str
    first_handle: int
    first: SequenceRequest
    """Choice 0, without its sequence id, which is the engine's to give"""
    num_choices: int
    fingerprint: str
    """Of the worker that the request was checked against; with another model it has to be checked again"""


class Engine(Protocol):
    """Sequences are named by handles that the front end chooses and never uses again."""

    @property
    def state(self) -> EngineState: ...

    async def submit(self, submission: "Submission") -> None:
        """Queues a request's sequences, all or none.

        Raises Draining, RequestIdInUse, InvalidRequest, QueueFull, DeadlinePassed and WorkerUnavailable. Outputs may
        come before it returns.
        """

    def stop(self, handle: int, num_output_tokens: int) -> None:
        """Output token number num_output_tokens completed a stop string; those past it don't count. The sequence's end
        comes as any other, if it has not come yet.
        """

    def close_request(self, first_handle: int) -> None:
        """Forgets a request; what of it still runs is aborted, and its blocks are free for the next plan."""


class EngineListener(Protocol):
    """What an engine tells a front end."""

    def on_outputs(self, batch: OutputBatch) -> None:
        """May be called from within Engine.stop()."""

    async def on_state(self, state: EngineState) -> None: ...


def hand_on(listener: EngineListener, batch: OutputBatch) -> list[int]:
    """Gives a listener its outputs. Those that it can't take end the requests that they are of, as their streams would
    lack tokens; gives the handles of these. Whoever calls goes on.
    """
    try:
        listener.on_outputs(batch)
    except Exception:
        logger.exception("outputs that the front end could not take")
        return fail_outputs(listener, batch.handles)
    return []


def failed_outputs(handles: Iterable[int], error: TandemError) -> list[OutputBatch]:
    """In place of outputs that could not be handed on: the requests whose sequences these are end with an error."""
    return [
        OutputBatch(ends=[SequenceEnd(handle, FinishReason.ERROR, 0, error=error)]) for handle in dict.fromkeys(handles)
    ]


def fail_outputs(listener: EngineListener, handles: Iterable[int]) -> list[int]:
    """Ends the requests of these sequences with an error, one by one; gives the handles."""
    failed = list(dict.fromkeys(handles))
    for batch in failed_outputs(failed, SequenceFailed("its outputs could not be taken by the front end")):
        try:
            listener.on_outputs(batch)
        except Exception:
            logger.exception("a request that the front end could not end")
    return failed


async def tell_state(listener: EngineListener, state: EngineState) -> None:
    """A listener that fails at it goes on with what it knew."""
    try:
        await listener.on_state(state)
    except Exception:
        logger.exception("the front end could not take the engine's state")
