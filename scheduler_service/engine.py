"""The scheduler as a front end sees it, and what it tells a front end. All plain data: the two may be two processes.

Knows neither: scheduler_service/engine_hub.py is the engine in its own process, remote_engine.py the one behind a
stream.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from scheduler_service.core.types import FinishReason, SequenceRequest
from shared.errors import TandemError
from shared.step_plan import RowLogprobs, WorkerInfo

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

    def extend(self, later: "OutputBatch") -> None:
        self.token_handles += later.token_handles
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.ends += later.ends


def failed_outputs(handles: Iterable[int], error: TandemError) -> list[OutputBatch]:
    """In place of outputs that could not be handed on: the requests whose sequences these are end with an error."""
    return [
        OutputBatch(ends=[SequenceEnd(handle, FinishReason.ERROR, 0, error=error)]) for handle in dict.fromkeys(handles)
    ]


class Engine(Protocol):
    """Sequences are named by handles that the front end chooses and never uses again."""

    @property
    def state(self) -> EngineState: ...

    async def submit(self, request_id: str, first_handle: int, sequences: Sequence[SequenceRequest]) -> None:
        """Queues a request's sequences, all or none; the i-th has the handle first_handle + i. They differ in their
        choice index alone.

        Raises Draining, RequestIdInUse, InvalidRequest, QueueFull and WorkerUnavailable. Outputs may come before it
        returns.
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


def choices_of(request_id: str, first: SequenceRequest, num_choices: int) -> list[SequenceRequest]:
    """A request's sequences: `first` with each choice's own id and index."""
    return [
        replace(first, sequence_id=f"{request_id}/{index}", sampling=replace(first.sampling, choice_index=index))
        for index in range(num_choices)
    ]
