"""Live requests: what the engine brings becomes text in each request's own buffer, for its reader to take.

Knows requests and their readers; of the engine only its interface. A slow reader slows nobody: its tokens gather in
its buffer and leave several at a time. Text is made when it is taken, but where stop strings must be looked for.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from scheduler_service.core.types import FinishReason
from scheduler_service.detokenizer import Detokenizer
from scheduler_service.engine import Engine, EngineState, OutputBatch, SequenceEnd, Submission
from scheduler_service.validation import GenerationRequest
from shared.errors import Draining, TandemError
from shared.step_plan import RowLogprobs


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(slots=True)
class ChoiceDelta:
    """What came of one choice since its last delta."""

    choice_index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[RowLogprobs] = field(default_factory=list)
    end: ChoiceEnd | None = None


class _Choice:
    """One sequence of a request: its detokenizer, and what its reader has not taken yet."""

    __slots__ = (
        "_detokenizer",
        "_end",
        "_num_decoded",
        "_num_taken",
        "_text",
        "index",
        "logprobs",
        "looks_for_stops",
        "request",
        "token_ids",
    )

    def __init__(self, request: "LiveRequest", index: int, detokenizer: Detokenizer) -> None:
        self.request = request
        self.index = index
        self.looks_for_stops = detokenizer.has_stop_strings
        self.token_ids: list[int] = []
        self.logprobs: list[RowLogprobs] = []
        self._detokenizer = detokenizer
        self._text = ""
        # Of token_ids, how many are in the text.
        self._num_decoded = 0
        self._num_taken = 0
        self._end: ChoiceEnd | None = None

    @property
    def num_output_tokens(self) -> int:
        return self._num_taken + len(self.token_ids)

    @property
    def has_news(self) -> bool:
        return bool(self.token_ids) or self._end is not None

    def find_stop(self, num_left_out: int) -> bool:
        """Decodes what is new, but for the last tokens left out, and drops what is past a stop string. True if there
        was one.
        """
        for position in range(self._num_decoded, len(self.token_ids) - num_left_out):
            self._text += self._detokenizer.add(self.token_ids[position])
            self._num_decoded = position + 1
            if self._detokenizer.matched_stop is not None:
                del self.token_ids[position + 1 :], self.logprobs[position + 1 :]
                return True
        return False

    def finish(self, end: SequenceEnd) -> None:
        undecoded = self.token_ids[self._num_decoded :]
        if end.stop_token_id is not None:
            # The text of a token that ended its sequence is not part of the output.
            del undecoded[-1:]
        self._text += self._detokenizer.finish(undecoded)
        self._num_decoded = len(self.token_ids)
        stop_string = self._detokenizer.matched_stop
        # Whatever the engine made of the tokens past it.
        reason = end.reason if stop_string is None else FinishReason.STOP
        self._end = ChoiceEnd(reason, stop_string, end.stop_token_id)

    def take(self) -> ChoiceDelta:
        undecoded = self.token_ids[self._num_decoded :]
        text = self._text + "".join(map(self._detokenizer.add, undecoded)) if undecoded else self._text
        delta = ChoiceDelta(self.index, text, self.token_ids, self.logprobs, self._end)
        self._num_taken += len(self.token_ids)
        self._text, self.token_ids, self.logprobs, self._num_decoded, self._end = "", [], [], 0, None
        return delta


class LiveRequest:
    """A request under way. Iterating deltas() is reading it; close() ends it, whatever its state."""

    def __init__(
        self,
        front_end: "FrontEnd",
        request: GenerationRequest,
        tokenizer: Tokenizer,
        first_handle: int,
        *,
        is_streaming: bool,
    ) -> None:
        self.request = request
        self.first_handle = first_handle
        self.is_streaming = is_streaming
        self._front_end = front_end
        self.has_news = asyncio.Event()
        self.error: TandemError | None = None
        self.choices = [
            _Choice(
                self,
                index,
                Detokenizer(tokenizer, request.stop_strings, skip_special_tokens=request.skip_special_tokens),
            )
            for index in range(request.num_choices)
        ]
        self.num_running = len(self.choices)
        self.num_cached_tokens = 0

    @property
    def num_output_tokens(self) -> int:
        return sum(choice.num_output_tokens for choice in self.choices)

    async def deltas(self) -> AsyncIterator[ChoiceDelta]:
        """News of the choices until all have ended: all at once at the end, unless the request streams. Raises the
        error that ended the request.
        """
        num_open = len(self.choices)
        while num_open:
            await self.has_news.wait()
            self.has_news.clear()
            for choice in self.choices:
                if choice.has_news:
                    delta = choice.take()
                    num_open -= delta.end is not None
                    yield delta
            if self.error is not None:
                raise self.error

    def close(self) -> None:
        self._front_end.close(self)


class FrontEnd:
    """All live requests of one front end. The engine's listener."""

    def __init__(self, tokenizer: Tokenizer, set_ready: Callable[[bool], Awaitable[None]]) -> None:
        self.tokenizer = tokenizer
        self._set_ready = set_ready
        self._choices: dict[int, _Choice] = {}
        # Ended here, by a stop string; the engine's word is under way.
        self._stopped: dict[int, _Choice] = {}
        self._next_handle = 0
        # Given by connect(); the two know each other.
        self._engine: Engine | None = None

    def connect(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "connect() comes first"
        return self._engine

    def refuse_if_draining(self) -> None:
        if self.engine.state.is_draining:
            raise Draining("the server is draining")

    async def open(self, request: GenerationRequest, *, is_streaming: bool) -> LiveRequest:
        """Starts a request; the caller closes it. Raises what Engine.submit raises."""
        live = LiveRequest(self, request, self.tokenizer, self._next_handle, is_streaming=is_streaming)
        self._next_handle += len(live.choices)
        # First, because outputs may come before submit returns.
        self._choices.update(enumerate(live.choices, start=live.first_handle))
        try:
            await self.engine.submit(
                Submission(
                    request.request_id, live.first_handle, request.first, request.num_choices, request.fingerprint
                )
            )
        except BaseException:
            self.close(live)
            raise
        return live

    def close(self, live: LiveRequest) -> None:
        """Forgets a request, whose sequences end if they run."""
        for handle in range(live.first_handle, live.first_handle + len(live.choices)):
            self._choices.pop(handle, None)
            self._stopped.pop(handle, None)
        self.engine.close_request(live.first_handle)

    def end_all(self, error: TandemError) -> None:
        for choice in [*self._choices.values(), *self._stopped.values()]:
            self._fail(choice.request, error)

    # The engine's listener

    def on_outputs(self, batch: OutputBatch) -> None:
        choices = self._choices
        watched: dict[int, _Choice] = {}
        for handle, token_id in zip(batch.token_handles, batch.token_ids, strict=True):
            choice = choices.get(handle)
            if choice is None:
                continue
            choice.token_ids.append(token_id)
            if choice.looks_for_stops:
                watched[handle] = choice
            if choice.request.is_streaming:
                choice.request.has_news.set()
        for handle, report in batch.logprobs:
            choice = choices.get(handle)
            if choice is not None:
                choice.logprobs.append(report)
        if watched:
            self._find_stops(watched, batch)
        for end in batch.ends:
            self._finish(end)

    async def on_state(self, state: EngineState) -> None:
        await self._set_ready(state.is_ready and not state.is_draining)

    def _find_stops(self, watched: dict[int, _Choice], batch: OutputBatch) -> None:
        ended_by_token = {end.handle for end in batch.ends if end.stop_token_id is not None}
        for handle, choice in watched.items():
            if choice.find_stop(num_left_out=int(handle in ended_by_token)):
                self._stopped[handle] = self._choices.pop(handle)
                self.engine.stop(handle, choice.num_output_tokens)

    def _finish(self, end: SequenceEnd) -> None:
        stopped = self._stopped.pop(end.handle, None)
        choice = stopped or self._choices.pop(end.handle, None)
        if choice is None:
            return
        live = choice.request
        if end.error is not None and stopped is None:
            self._fail(live, end.error)
            return
        choice.finish(end)
        live.num_cached_tokens += end.num_cached_tokens
        live.num_running -= 1
        if live.is_streaming or not live.num_running:
            live.has_news.set()

    def _fail(self, live: LiveRequest, error: TandemError) -> None:
        """Ends a whole request with an error."""
        live.error = error
        live.has_news.set()
        self.close(live)
