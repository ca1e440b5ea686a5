"""One front end: its live requests. Outputs of the engine go into each request's buffers, from which its reader takes
them.

It knows requests, and of the engine only the interface. A slow reader does not slow down others: its tokens gather in
its buffers and leave many at a time, and past a limit its request ends. Whatever goes wrong with one request (its text,
its stop strings, its reader) ends that request alone.
"""

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tokenizers import Tokenizer

from tandem_scheduler.engine_interface import (
    Engine,
    EngineState,
    FrontEndStats,
    OutputBatch,
    SequenceEnd,
    Submission,
    TraceContext,
)
from tandem_scheduler.front_end.chat.chat_renderer import ChatRenderer
from tandem_scheduler.front_end.grammar_check import GrammarChecker
from tandem_scheduler.front_end.live_request import TOKEN_BYTES, Choice, LiveRequest
from tandem_scheduler.front_end.logprob_buffer import logprob_bytes
from tandem_scheduler.front_end.text.detokenizer import TextDecoder
from tandem_scheduler.front_end.text.encoder import TextEncoder
from tandem_scheduler.front_end.text.splitter import token_lengths
from tandem_scheduler.front_end.text.tokenizer_faults import text_failure
from tandem_scheduler.front_end.token_times import TokenTimes
from tandem_scheduler.front_end.validation import GenerationRequest
from tandem_shared.errors import Draining, TandemError, WorkerUnavailable, reason_of
from tandem_shared.sampling_fields import MAX_LOGPROBS
from tandem_shared.sampling_lists import MAX_LOGPROB_TOKEN_IDS
from tandem_shared.step_plan import PromptLogprobs, WorkerInfo

MAX_UNREAD_BYTES = 256 * 1024 * 1024
"""The limit of all buffers together. Past it the request that holds most ends."""

COUNT_EVERY_BYTES = 8 * 1024 * 1024
"""The buffers are counted once so many bytes have come since the last count."""

MAX_REPORT_BYTES = logprob_bytes(MAX_LOGPROBS, MAX_LOGPROB_TOKEN_IDS)
"""The most that the log-probabilities in the place of one token take."""

T = TypeVar("T")


class FrontEnd:
    """All live requests of one front end. The engine's listener."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        set_ready: Callable[[bool], Awaitable[None]],
        grammars: GrammarChecker | None = None,
        chats: ChatRenderer | None = None,
        *,
        has_traces: bool = False,
    ) -> None:
        """Without `grammars`, requests with a structured output are refused, and without `chats` conversations."""
        self.has_traces = has_traces
        self.grammars = grammars
        self.chats = chats or ChatRenderer(None)
        lengths = token_lengths(tokenizer)
        self.encoder = TextEncoder(tokenizer, lengths)
        self.decoder = TextDecoder(tokenizer, lengths)
        self._set_ready = set_ready
        self._choices: dict[int, Choice] = {}
        # Choices that a stop string ended here, until the engine says so too.
        self._stopped: dict[int, Choice] = {}
        # Requests that were opened and not closed yet, ended or not, by first handle.
        self._lives: dict[int, LiveRequest] = {}
        self._token_times = TokenTimes()
        self._stats = FrontEndStats()
        self._num_uncounted_bytes = 0
        self._next_handle = 0
        # Given by connect(); the two know each other.
        self._engine: Engine | None = None

    def connect(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "connect() comes first"
        return self._engine

    @property
    def worker(self) -> WorkerInfo:
        """The last worker that was seen. Raises WorkerUnavailable if there was none yet."""
        worker = self.engine.state.worker
        if worker is None:
            raise WorkerUnavailable("no worker has been seen yet")
        return worker

    def refuse_if_draining(self) -> None:
        if self.engine.state.is_draining:
            raise Draining("the server is draining")

    async def open(
        self, request: GenerationRequest, arrived_at: float | None = None, trace: TraceContext | None = None
    ) -> LiveRequest:
        """Starts a request; the caller closes it. arrived_at: when its call came, by time.monotonic(); now if not
        given. trace: of its call, if there are traces. Raises what Engine.submit raises.
        """
        arrived_at = time.monotonic() if arrived_at is None else arrived_at
        live = LiveRequest(request, self.decoder, self._next_handle, self.close, arrived_at)
        self._next_handle += len(live.choices)
        self._lives[live.first_handle] = live
        # This comes first, because outputs may come before submit() returns.
        self._choices.update(enumerate(live.choices, start=live.first_handle))
        try:
            await self.engine.submit(
                Submission(
                    request.request_id,
                    live.first_handle,
                    request.first,
                    request.num_choices,
                    request.fingerprint,
                    trace,
                )
            )
        except BaseException:
            self.close(live)
            raise
        return live

    def close(self, live: LiveRequest) -> None:
        """Forgets a request and ends those of its sequences that still run."""
        for handle in range(live.first_handle, live.first_handle + len(live.choices)):
            self._choices.pop(handle, None)
            self._stopped.pop(handle, None)
            self._token_times.forget(handle)
        self._lives.pop(live.first_handle, None)
        self.engine.close_request(live.first_handle, live.outcome(time.monotonic()))

    def end_all(self, error: TandemError) -> None:
        for choice in [*self._choices.values(), *self._stopped.values()]:
            self._fail(choice.request, error)

    def note_refusal(self, error: TandemError) -> None:
        """Counts a request that was refused: before its call ran, before it was opened, or by the engine."""
        self._stats.num_refused[reason_of(type(error))] += 1

    # The engine's listener

    def on_outputs(self, batch: OutputBatch) -> None:
        choices = self._choices
        self._note_times(batch.token_handles)
        watched: dict[int, Choice] = {}
        for handle, token_id in zip(batch.token_handles, batch.token_ids, strict=True):
            choice = choices.get(handle)
            if choice is None:
                continue
            live = choice.request
            choice.token_ids.append(token_id)
            live.num_unread_tokens += 1
            if choice.looks_for_stops:
                watched[handle] = choice
            if live.is_streaming:
                live.has_news.set()
            if live.num_unread_tokens > live.max_unread_tokens:
                self._fail_behind(live)
        for handle, prompt_report in batch.prompt_logprobs:
            self._add_prompt_logprobs(handle, prompt_report)
        for handle, report in batch.logprobs:
            choice = choices.get(handle)
            if choice is not None:
                self._guard(choice.request, choice.add_logprobs, report)
        if watched:
            self._find_stops(watched, batch)
        for end in batch.ends:
            self._finish(end)
        self._bound_unread(batch)

    async def on_state(self, state: EngineState) -> None:
        await self._set_ready(state.is_ready and not state.is_draining)

    def take_stats(self) -> FrontEndStats:
        taken, self._stats = self._stats, FrontEndStats()
        return taken

    def _note_times(self, handles: list[int]) -> None:
        if not handles:
            return
        now = time.monotonic()
        for handle in self._token_times.note(handles, now, self._choices, self._stats.token_gaps):
            self._choices[handle].request.note_first_token(now)

    def _add_prompt_logprobs(self, handle: int, report: PromptLogprobs) -> None:
        choice = self._choices.get(handle)
        if choice is None:
            return
        live = choice.request
        self._guard(live, live.add_prompt_logprobs, report)
        self._num_uncounted_bytes += logprob_bytes(report.num_top, 0) * len(report.logprobs)
        if live.is_streaming:
            live.has_news.set()
        if live.num_unread_bytes > live.max_unread_bytes:
            self._fail_behind(live)

    def _find_stops(self, watched: dict[int, Choice], batch: OutputBatch) -> None:
        ended_by_token = {end.handle for end in batch.ends if end.stop_token_id is not None}
        for handle, choice in watched.items():
            if handle in self._choices and self._guard(choice.request, choice.find_stop, handle in ended_by_token):
                self._stopped[handle] = self._choices.pop(handle)
                self._token_times.forget(handle)
                self.engine.stop(handle, choice.num_output_tokens)
            elif choice.request.num_unread_characters > choice.request.max_unread_characters:
                self._fail_behind(choice.request)

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
        if not live.num_running:
            live.ended_at = time.monotonic()
        if live.is_streaming or not live.num_running:
            live.has_news.set()

    def _guard(self, live: LiveRequest, function: Callable[..., T], *args: Any) -> T | None:
        """Calls a function for a request. If it fails, the request ends, and nothing else."""
        try:
            return function(*args)
        except BaseException as error:
            self._fail(live, text_failure("the output of this request could not be read", error))
            return None

    def _fail(self, live: LiveRequest, error: TandemError) -> None:
        """Ends a whole request with an error."""
        live.error = error
        live.has_failed = True
        live.has_news.set()
        self.close(live)

    def _fail_behind(self, live: LiveRequest) -> None:
        """Ends a request that holds more than it may, and drops what it holds."""
        error = live.too_large()
        live.drop_unread()
        self._fail(live, error)

    def _bound_unread(self, batch: OutputBatch) -> None:
        """If all requests together hold too much, ends those whose readers are furthest behind. It counts only once
        COUNT_EVERY_BYTES have come.
        """
        self._num_uncounted_bytes += TOKEN_BYTES * len(batch.token_ids) + MAX_REPORT_BYTES * len(batch.logprobs)
        if self._num_uncounted_bytes < COUNT_EVERY_BYTES:
            return
        self._num_uncounted_bytes = 0
        lives = sorted(self._lives.values(), key=lambda live: live.num_unread_bytes)
        num_bytes = sum(live.num_unread_bytes for live in lives)
        while num_bytes > MAX_UNREAD_BYTES:
            live = lives.pop()
            num_bytes -= live.num_unread_bytes
            self._fail_behind(live)


@contextmanager
def counting_refusals(front_end: FrontEnd) -> Iterator[None]:
    """Around all that may refuse a request."""
    try:
        yield
    except TandemError as error:
        front_end.note_refusal(error)
        raise


@contextmanager
def closing(live: LiveRequest) -> Iterator[None]:
    """Closes the request at the end. If that is an error, the client has not got what came."""
    try:
        yield
    except TandemError:
        live.has_failed = True
        raise
    finally:
        live.close()
