"""The live requests of all front ends. The hub is the step loop's one sink, and gives each front end an Attachment,
which is that front end's Engine.

Here request ids are unique, and drain and abort reach every front end. Knows the step loop and plain data; nothing of
text, calls or processes.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tandem_scheduler.core.types import FinishedSequence, FinishReason, SequenceRequest, StepOutputs
from tandem_scheduler.engine.conversions import counts_of, error_of, sampling_of_choice
from tandem_scheduler.engine.observer import Observer
from tandem_scheduler.engine.request_events import RequestEvents
from tandem_scheduler.engine.step_loop import StepLoop
from tandem_scheduler.engine_interface import (
    EngineListener,
    EngineState,
    FrontEndStats,
    OutputBatch,
    RequestOutcome,
    SequenceEnd,
    Submission,
    hand_on,
    tell_state,
)
from tandem_shared.errors import (
    Draining,
    ProtocolError,
    RequestIdInUse,
    RequestNotFound,
    SequenceFailed,
    TandemError,
    Undrained,
    WorkerUnavailable,
)


@dataclass(slots=True, eq=False)
class _Request:
    request_id: str
    sequences: list["_Sequence"] = field(default_factory=list)
    num_live: int = 0


@dataclass(slots=True, eq=False)
class _Sequence:
    sequence_id: int
    handle: int
    request: _Request
    attachment: "Attachment"
    # As the core counted them, once the sequence has ended there.
    num_output_tokens: int | None = None


class EngineHub:
    """The step loop's sink. A request is live until its sequences end, and open until its front end closes it."""

    def __init__(self, observer: Observer | None = None) -> None:
        self.is_draining = False
        self._is_stopping = False
        self._events = RequestEvents(observer) if observer is not None else None
        self._is_ready = False
        self._attachments: list[Attachment] = []
        self._stats = FrontEndStats()
        # Live requests and sequences alone.
        self._requests: dict[str, _Request] = {}
        self._sequences: dict[int, _Sequence] = {}
        self._sequence_ids = itertools.count()
        self._num_open = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_undrained = asyncio.Event()
        # Given by connect(); the two know each other.
        self._step_loop: StepLoop | None = None
        self.load_report: Callable[[], bytes] = lambda: b""
        """Gives the engine's load now, for the front ends (Engine.load_report)."""

    def connect(self, step_loop: StepLoop) -> None:
        self._step_loop = step_loop

    @property
    def step_loop(self) -> StepLoop:
        assert self._step_loop is not None, "connect() comes first"
        return self._step_loop

    @property
    def state(self) -> EngineState:
        return EngineState(self.step_loop.worker, self._is_ready, self.is_draining)

    @property
    def num_observed(self) -> int:
        """How many requests and sequences are kept for the observer's sake. 0 when none is open."""
        return self._events.num_held if self._events is not None else 0

    def attach(self, listener: EngineListener, is_gone: Callable[[], bool] = lambda: False) -> "Attachment":
        """The engine for one more front end. is_gone says whether that has ended although it is not detached yet."""
        attachment = Attachment(self, listener, is_gone)
        self._attachments.append(attachment)
        return attachment

    def detach(self, attachment: "Attachment") -> None:
        """Closes all requests of a front end that has gone."""
        self._attachments.remove(attachment)
        self._stats.add(attachment.listener.take_stats())
        for first_handle in list(attachment.requests):
            attachment.close_request(first_handle)

    # For the operator

    def front_end_stats(self) -> FrontEndStats:
        """The sum of what all front ends have counted, those that have gone too."""
        for attachment in self._attachments:
            self._stats.add(attachment.listener.take_stats())
        return self._stats

    def abort(self, request_id: str) -> None:
        """Ends a live request's choices with ABORT."""
        request = self._requests.get(request_id)
        if request is None:
            raise RequestNotFound(f"no live request has the id {request_id!r}")
        ended = [self.step_loop.abort(sequence.sequence_id) for sequence in request.sequences]
        self.on_finished([end for end in ended if end is not None])

    async def drain(self) -> None:
        """Refuses new requests; returns when the open ones are closed. Raises Undrained if undrain() comes first."""
        if not self.is_draining:
            self.is_draining = True
            self._is_undrained = asyncio.Event()
        await self._tell_state()
        undrained = asyncio.create_task(self._is_undrained.wait())
        idle = asyncio.create_task(self._is_idle.wait())
        try:
            await asyncio.wait([undrained, idle], return_when=asyncio.FIRST_COMPLETED)
        finally:
            undrained.cancel()
            idle.cancel()
        if not idle.done():
            raise Undrained("Undrain was called while requests were open")

    async def drain_for_good(self) -> None:
        """Drains as the service stops, which nothing takes back."""
        self._is_stopping = True
        await self.drain()

    async def undrain(self) -> None:
        """Takes new requests again. Raises WorkerUnavailable if the service is stopping."""
        if self._is_stopping:
            raise WorkerUnavailable("the server is stopping")
        self.is_draining = False
        self._is_undrained.set()
        await self._tell_state()

    def end_all(self, error: TandemError) -> None:
        """Ends every live request with an error."""
        self._fail(list(self._sequences), error)

    # The step loop's sink

    def on_outputs(self, outputs: StepOutputs) -> None:
        sequences = self._sequences
        for sequence_id, token_id in zip(outputs.sequence_ids, outputs.token_ids, strict=True):
            sequence = sequences[sequence_id]
            pending = sequence.attachment.pending
            pending.token_handles.append(sequence.handle)
            pending.token_ids.append(token_id)
        for sequence_id, report in outputs.logprobs.items():
            sequence = sequences[sequence_id]
            sequence.attachment.pending.logprobs.append((sequence.handle, report))
        for sequence_id, prompt_report in outputs.prompt_logprobs:
            sequence = sequences[sequence_id]
            sequence.attachment.pending.prompt_logprobs.append((sequence.handle, prompt_report))
        if self._events is not None:
            self._events.outputs(outputs.sequence_ids)
        self.on_finished(outputs.finished)

    def on_finished(self, finished: list[FinishedSequence]) -> None:
        for end in finished:
            sequence = self._sequences[end.sequence_id]
            sequence.num_output_tokens = end.num_output_tokens
            error = error_of(end)
            reason = end.reason if error is None else FinishReason.ERROR
            self._end(sequence, SequenceEnd(sequence.handle, reason, end.num_cached_tokens, end.stop_token_id, error))
        self._flush()

    def on_outputs_lost(self, sequence_ids: list[int], finished: list[FinishedSequence]) -> None:
        for end in finished:
            if (sequence := self._sequences.get(end.sequence_id)) is not None:
                sequence.num_output_tokens = end.num_output_tokens
        lost = [*sequence_ids, *(end.sequence_id for end in finished)]
        self._fail(lost, SequenceFailed("its outputs could not be handed on"))

    def on_worker_gone(self, error: WorkerUnavailable) -> None:
        self.end_all(error)

    async def on_readiness(self, is_ready: bool) -> None:
        self._is_ready = is_ready
        await self._tell_state()

    # For the attachments

    def open(self, attachment: "Attachment", submission: Submission) -> None:
        """Submits a request for a front end. Raises what Engine.submit raises."""
        try:
            choices = self._open(attachment, submission)
        except TandemError as error:
            if self._events is not None:
                self._events.refused(submission.request_id, error)
            raise
        if self._events is not None:
            self._events.submitted(submission, choices)

    def _open(self, attachment: "Attachment", submission: Submission) -> list[SequenceRequest]:
        """Gives the sequences that it made of the submission."""
        request_id, first = submission.request_id, submission.first
        if self.is_draining:
            raise Draining("the server is draining")
        handles = range(submission.first_handle, submission.first_handle + submission.num_choices)
        if not attachment.sequences.keys().isdisjoint(handles):
            raise ProtocolError("a front end gave a sequence's handle to another one")
        if (holder := self._requests.get(request_id)) is not None:
            first_sequence = holder.sequences[0]
            if not first_sequence.attachment.is_gone():
                raise RequestIdInUse(f"request {request_id!r} is live")
            # Its client has seen the end of its front end before the engine did, and tries again.
            first_sequence.attachment.close_request(first_sequence.handle)
        worker = self.step_loop.worker
        if worker is not None and worker.fingerprint != submission.fingerprint:
            raise WorkerUnavailable("the worker came to have another model while the request was checked")
        choices = [
            replace(first, sequence_id=next(self._sequence_ids), sampling=sampling_of_choice(first.sampling, index))
            for index in range(submission.num_choices)
        ]
        self.step_loop.submit(choices)
        request = _Request(request_id, num_live=len(choices))
        for handle, choice in zip(handles, choices, strict=True):
            sequence = _Sequence(choice.sequence_id, handle, request, attachment)
            request.sequences.append(sequence)
            attachment.sequences[handle] = self._sequences[choice.sequence_id] = sequence
        attachment.requests[submission.first_handle] = self._requests[request_id] = request
        self._num_open += 1
        self._is_idle.clear()
        return choices

    def stop(self, sequence: _Sequence, num_output_tokens: int) -> None:
        finished = self.step_loop.stop(sequence.sequence_id, num_output_tokens)
        if finished is not None:
            self.on_finished([finished])
        elif sequence.num_output_tokens is not None:
            num_left = min(num_output_tokens, sequence.num_output_tokens)
            self.step_loop.discount(sequence.num_output_tokens - num_left)
            sequence.num_output_tokens = num_left

    def abort_sequence(self, sequence: _Sequence | None) -> None:
        """Ends a sequence whose front end wants no more of it, or could not take its outputs."""
        if sequence is not None and self._sequences.get(sequence.sequence_id) is sequence:
            ended = self.step_loop.abort(sequence.sequence_id)
            num_output_tokens, num_cached_tokens = counts_of(ended)
            self._forget(
                sequence, SequenceEnd(sequence.handle, FinishReason.ABORT, num_cached_tokens), num_output_tokens
            )

    def close_request(self, attachment: "Attachment", first_handle: int, outcome: RequestOutcome | None = None) -> None:
        request = attachment.requests.pop(first_handle, None)
        if request is None:
            return
        for sequence in request.sequences:
            del attachment.sequences[sequence.handle]
            self.abort_sequence(sequence)
        if self._events is not None:
            self._events.closed(request.sequences[0].sequence_id, outcome)
        self._num_open -= 1
        if not self._num_open:
            self._is_idle.set()

    def _fail(self, sequence_ids: list[int], error: TandemError) -> None:
        """Ends those of the sequences that are live with an error."""
        for sequence_id in sequence_ids:
            if (sequence := self._sequences.get(sequence_id)) is not None:
                # The front end may still find a stop in the tokens that it has, and report it.
                ended = self.step_loop.abort(sequence_id)
                if ended is not None:
                    sequence.num_output_tokens = ended.num_output_tokens
                _, num_cached_tokens = counts_of(ended)
                self._end(sequence, SequenceEnd(sequence.handle, FinishReason.ERROR, num_cached_tokens, error=error))
        self._flush()

    def _end(self, sequence: _Sequence, end: SequenceEnd) -> None:
        self._forget(sequence, end, sequence.num_output_tokens or 0)
        sequence.attachment.pending.ends.append(end)

    def _forget(self, sequence: _Sequence, end: SequenceEnd, num_output_tokens: int) -> None:
        del self._sequences[sequence.sequence_id]
        if self._events is not None:
            self._events.ended(sequence.sequence_id, end, num_output_tokens)
        sequence.request.num_live -= 1
        if not sequence.request.num_live:
            del self._requests[sequence.request.request_id]

    def _flush(self) -> None:
        for attachment in self._attachments:
            attachment.flush()

    async def _tell_state(self) -> None:
        for attachment in list(self._attachments):
            await tell_state(attachment.listener, self.state)


class Attachment:
    """One front end's Engine, in the engine's own process."""

    def __init__(self, hub: EngineHub, listener: EngineListener, is_gone: Callable[[], bool]) -> None:
        self._hub = hub
        self.listener = listener
        self.is_gone = is_gone
        self.pending = OutputBatch()
        # Open requests by their first handle, and their sequences by handle.
        self.requests: dict[int, _Request] = {}
        self.sequences: dict[int, _Sequence] = {}

    @property
    def state(self) -> EngineState:
        return self._hub.state

    @property
    def load_report(self) -> bytes:
        return self._hub.load_report()

    async def submit(self, submission: Submission) -> None:
        self._hub.open(self, submission)

    def stop(self, handle: int, num_output_tokens: int) -> None:
        sequence = self.sequences.get(handle)
        if sequence is not None:
            self._hub.stop(sequence, num_output_tokens)

    def close_request(self, first_handle: int, outcome: RequestOutcome | None = None) -> None:
        self._hub.close_request(self, first_handle, outcome)

    def flush(self) -> None:
        if self.pending:
            batch, self.pending = self.pending, OutputBatch()
            for handle in hand_on(self.listener, batch):
                self._hub.abort_sequence(self.sequences.get(handle))
