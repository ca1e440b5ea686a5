"""Live requests: what the step loop brings becomes text in each request's own buffer, for its reader to take.

Knows requests and their readers; of the scheduler only the step loop's plain data. A slow reader slows nobody: its
tokens gather in its buffer and leave several at a time.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from scheduler_service.core.types import FinishedSequence, FinishReason, StepOutputs
from scheduler_service.detokenizer import Detokenizer
from scheduler_service.step_loop import StepLoop
from scheduler_service.validation import GenerationRequest
from shared.errors import Draining, RequestIdInUse, RequestNotFound, SequenceFailed, TandemError, WorkerUnavailable
from shared.step_plan import RowLogprobs

logger = logging.getLogger(__name__)


@dataclass
class ChoiceDelta:
    """What came of one choice since its last delta."""

    choice_index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[RowLogprobs] = field(default_factory=list)
    finished: FinishedSequence | None = None
    stop_string: str | None = None

    @property
    def is_empty(self) -> bool:
        return not self.token_ids and self.finished is None


class _Choice:
    """One sequence of a request: its detokenizer, and what its reader has not taken yet."""

    def __init__(self, request: "LiveRequest", index: int, detokenizer: Detokenizer) -> None:
        self.request = request
        self.index = index
        self.detokenizer = detokenizer
        self.num_output_tokens = 0
        self.delta = ChoiceDelta(index)

    def add_token(self, token_id: int, logprobs: RowLogprobs | None, *, has_text: bool) -> None:
        self.num_output_tokens += 1
        self.delta.token_ids.append(token_id)
        if logprobs is not None:
            self.delta.logprobs.append(logprobs)
        if has_text:
            self.delta.text += self.detokenizer.add(token_id)

    def finish(self, finished: FinishedSequence) -> None:
        self.delta.text += self.detokenizer.finish()
        self.delta.stop_string = self.detokenizer.matched_stop
        self.delta.finished = finished

    def take(self) -> ChoiceDelta:
        delta, self.delta = self.delta, ChoiceDelta(self.index)
        return delta


class LiveRequest:
    """A request under way. Iterating deltas() is reading it; close() ends it, whatever its state."""

    def __init__(self, front_end: "FrontEnd", request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self.request = request
        self._front_end = front_end
        self.has_news = asyncio.Event()
        self.error: TandemError | None = None
        self.choices = [
            _Choice(
                self,
                index,
                Detokenizer(tokenizer, request.stop_strings, skip_special_tokens=request.skip_special_tokens),
            )
            for index in range(len(request.sequences))
        ]
        self.num_cached_tokens = 0

    @property
    def num_output_tokens(self) -> int:
        return sum(choice.num_output_tokens for choice in self.choices)

    async def deltas(self) -> AsyncIterator[ChoiceDelta]:
        """News of the choices until all have ended. Raises the error that ended the request."""
        num_open = len(self.choices)
        while num_open:
            await self.has_news.wait()
            self.has_news.clear()
            for choice in self.choices:
                if not choice.delta.is_empty:
                    delta = choice.take()
                    num_open -= delta.finished is not None
                    yield delta
            if self.error is not None:
                raise self.error

    def close(self) -> None:
        self._front_end.close(self)


class FrontEnd:
    """All live requests. The step loop's sink."""

    def __init__(self, tokenizer: Tokenizer, set_ready: Callable[[bool], Awaitable[None]]) -> None:
        self.tokenizer = tokenizer
        self.is_draining = False
        self._set_ready = set_ready
        self._requests: dict[str, LiveRequest] = {}
        self._choices: dict[str, _Choice] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        # Given by connect(); the two know each other.
        self._step_loop: StepLoop | None = None

    def connect(self, step_loop: StepLoop) -> None:
        self._step_loop = step_loop

    @property
    def step_loop(self) -> StepLoop:
        assert self._step_loop is not None, "connect() comes first"
        return self._step_loop

    def refuse_if_draining(self) -> None:
        if self.is_draining:
            raise Draining("the server is draining")

    def open(self, request: GenerationRequest) -> LiveRequest:
        """Starts a request; the caller closes it."""
        self.refuse_if_draining()
        if request.request_id in self._requests:
            raise RequestIdInUse(f"request {request.request_id!r} is live")
        live = LiveRequest(self, request, self.tokenizer)
        self.step_loop.submit(request.sequences)
        self._requests[request.request_id] = live
        self._is_idle.clear()
        for sequence, choice in zip(request.sequences, live.choices, strict=True):
            self._choices[sequence.sequence_id] = choice
        return live

    def close(self, live: LiveRequest) -> None:
        """Forgets a request; what of it still runs is aborted, and its blocks are free for the next plan."""
        for sequence in live.request.sequences:
            if self._choices.pop(sequence.sequence_id, None) is not None:
                self.step_loop.abort(sequence.sequence_id)
        self._requests.pop(live.request.request_id, None)
        if not self._requests:
            self._is_idle.set()

    def abort(self, request_id: str) -> None:
        """Ends a live request's choices with ABORT."""
        live = self._requests.get(request_id)
        if live is None:
            raise RequestNotFound(f"no live request has the id {request_id!r}")
        for sequence in live.request.sequences:
            finished = self.step_loop.abort(sequence.sequence_id)
            if finished is not None:
                self._finish(finished)

    async def drain(self) -> None:
        """Refuses new requests; returns when the live ones have ended."""
        self.is_draining = True
        await self._set_ready(False)
        await self._is_idle.wait()

    def end_all(self, error: TandemError) -> None:
        for live in list(self._requests.values()):
            self._fail(live, error)

    # The step loop's sink

    def on_outputs(self, outputs: StepOutputs) -> None:
        # The text of a token that ended its sequence is not part of the output.
        last = {end.sequence_id for end in outputs.finished if end.stop_token_id is not None}
        for sequence_id, token_id in zip(outputs.sequence_ids, outputs.token_ids, strict=True):
            choice = self._choices.get(sequence_id)
            if choice is None:
                continue
            choice.add_token(token_id, outputs.logprobs.get(sequence_id), has_text=sequence_id not in last)
            choice.request.has_news.set()
            if choice.detokenizer.matched_stop is not None:
                self._stop_at_string(sequence_id, choice, outputs)
        self.on_finished(outputs.finished)

    def on_finished(self, finished: list[FinishedSequence]) -> None:
        for end in finished:
            self._finish(end)

    def on_worker_gone(self, error: WorkerUnavailable) -> None:
        self.end_all(error)

    async def on_readiness(self, is_ready: bool) -> None:
        await self._set_ready(is_ready and not self.is_draining)

    def _stop_at_string(self, sequence_id: str, choice: _Choice, outputs: StepOutputs) -> None:
        """The core may have ended the sequence in this very step, by length; a stop string comes first."""
        finished = self.step_loop.stop(sequence_id, choice.num_output_tokens)
        if finished is None:
            finished = next(end for end in outputs.finished if end.sequence_id == sequence_id)
        self._choices.pop(sequence_id)
        choice.finish(
            FinishedSequence(sequence_id, FinishReason.STOP, choice.num_output_tokens, finished.num_cached_tokens)
        )
        choice.request.num_cached_tokens += finished.num_cached_tokens

    def _finish(self, finished: FinishedSequence) -> None:
        choice = self._choices.pop(finished.sequence_id, None)
        if choice is None:
            return
        if finished.reason is FinishReason.ERROR:
            self._fail(choice.request, SequenceFailed(finished.error or "the sequence failed"))
            return
        choice.finish(finished)
        choice.request.num_cached_tokens += finished.num_cached_tokens
        choice.request.has_news.set()

    def _fail(self, live: LiveRequest, error: TandemError) -> None:
        """Ends a whole request with an error."""
        live.error = error
        live.has_news.set()
        for sequence in live.request.sequences:
            if self._choices.pop(sequence.sequence_id, None) is not None:
                self.step_loop.abort(sequence.sequence_id)
