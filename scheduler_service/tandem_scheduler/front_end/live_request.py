"""A request under way, as its reader sees it: the tokens of each choice gather in packed buffers until they are taken.

Tokens become text when they are taken, in the reader's own task. Only where a request has stop strings they become text
as they come.
"""

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from tandem_scheduler.core.types import FinishReason
from tandem_scheduler.engine_interface import RequestOutcome, SequenceEnd
from tandem_scheduler.front_end.logprob_buffer import LogprobBuffer, logprob_bytes
from tandem_scheduler.front_end.prompt_reports import PromptReports
from tandem_scheduler.front_end.reply_size import REPLY_ADVICE, min_reply_size
from tandem_scheduler.front_end.text.detokenizer import MIN_IDS_WITHOUT_GIL, Detokenizer, TextDecoder
from tandem_scheduler.front_end.text.stop_strings import StopStrings
from tandem_scheduler.front_end.text.tokenizer_faults import text_failure
from tandem_scheduler.front_end.validation import GenerationRequest
from tandem_shared.errors import OutputTooLarge, TandemError
from tandem_shared.step_plan import PromptLogprobs, RowLogprobs

MAX_TOKENS_PER_DELTA = 64
"""The most tokens in one message of a stream. More leave in several messages, so that none takes long to make or is too
large for a client."""

MAX_UNREAD_BYTES = 16 * 1024 * 1024
"""The limit of one stream's buffers: 4 million tokens, or 96,000 with 20 log-probabilities each."""

TOKEN_BYTES = 4
"""The size of a token in a buffer, without its log-probabilities."""

MAX_DELTA_BYTES = 1024 * 1024
"""The limit of the log-probabilities in one message of a stream, so that a client takes it."""

ENTRY_BYTES = 32
"""The most bytes of a token's log-probability in a message, without the token's bytes and text."""


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class ChoiceDelta:
    """The new output of one choice since its last delta. `end` comes with the last one. A delta with is_prompt has
    tokens of the prompt and their log-probabilities instead, and nothing else.
    """

    choice_index: int
    text: str
    token_ids: "array[int]"
    logprobs: LogprobBuffer
    end: ChoiceEnd | None
    is_prompt: bool = False


class Choice:
    """One sequence of a request: its detokenizer, and the output that its reader has not taken yet."""

    __slots__ = (
        "_detokenizer",
        "_end",
        "_logprobs",
        "_num_decoded",
        "_num_taken",
        "_texts",
        "index",
        "looks_for_stops",
        "reason",
        "request",
        "token_ids",
    )

    def __init__(self, request: "LiveRequest", index: int, detokenizer: Detokenizer) -> None:
        self.request = request
        self.index = index
        self.looks_for_stops = detokenizer.has_stop_strings
        self.token_ids = array("i")
        self._logprobs = LogprobBuffer()
        self._detokenizer = detokenizer
        self._texts: list[str] = []
        # How many of token_ids are in the texts.
        self._num_decoded = 0
        self._num_taken = 0
        self._end: SequenceEnd | None = None
        self.reason: FinishReason | None = None
        """Why it ended, once it has."""

    @property
    def num_output_tokens(self) -> int:
        return self._num_taken + len(self.token_ids)

    @property
    def has_news(self) -> bool:
        return bool(self.token_ids) or self._end is not None

    def add_logprobs(self, report: RowLogprobs) -> None:
        self._logprobs.append(report)

    def find_stop(self, has_stop_token: bool) -> bool:
        """Looks for a stop string in the new tokens. If there is one, drops the tokens past it and returns True.

        has_stop_token: the last token ended the sequence, so its text is not part of the output.
        """
        for position in range(self._num_decoded, len(self.token_ids) - has_stop_token):
            text = self._detokenizer.add(self.token_ids[position])
            self._texts.append(text)
            self.request.num_unread_characters += len(text)
            self._num_decoded = position + 1
            if self._detokenizer.matched_stop is not None:
                self.request.num_unread_tokens -= len(self.token_ids) - (position + 1)
                del self.token_ids[position + 1 :]
                if self._logprobs:
                    self._logprobs.cut(position + 1)
                return True
        return False

    def finish(self, end: SequenceEnd) -> None:
        self._end = end
        # A stop string ends the choice with STOP, whatever the engine made of the tokens past it.
        self.reason = end.reason if self._detokenizer.matched_stop is None else FinishReason.STOP

    def drop(self) -> None:
        """Forgets the output that was not taken."""
        self.token_ids = array("i")
        self._logprobs = LogprobBuffer()
        self._texts, self._num_decoded, self._end = [], 0, None

    @property
    def num_unread_characters(self) -> int:
        return sum(map(len, self._texts))

    def num_undecoded(self, max_tokens: int) -> int:
        """How many tokens take(max_tokens) would have to decode."""
        return min(len(self.token_ids), max_tokens) - self._num_decoded

    def take(self, max_tokens: int) -> ChoiceDelta:
        """The first max_tokens of the output, and the choice's end if that is all of it. Raises what the tokenizer
        raises.
        """
        is_all = len(self.token_ids) <= max_tokens
        token_ids = self.token_ids[:max_tokens]
        undecoded = token_ids[self._num_decoded :]
        # Read once: drop() may come while this runs in a thread.
        engine_end = self._end
        text, end = "".join(self._texts), None
        if is_all and engine_end is not None:
            # The text of a token that ended its sequence is not part of the output.
            text += self._detokenizer.finish(undecoded[:-1] if engine_end.stop_token_id is not None else undecoded)
            end = self._choice_end(engine_end)
            self._end = None
        else:
            # The end of a token that ends its sequence is missing where another choice failed in the same step.
            is_stopped = bool(undecoded) and undecoded[-1] in self.request.request.first.stop_token_ids
            text += "".join(map(self._detokenizer.add, undecoded[:-1] if is_stopped else undecoded))
        del self.token_ids[:max_tokens]
        self._num_decoded = max(0, self._num_decoded - len(token_ids))
        self._num_taken += len(token_ids)
        self._texts.clear()
        logprobs = self._logprobs.take(len(token_ids))
        return ChoiceDelta(self.index, text, token_ids, logprobs, end)

    def _choice_end(self, end: SequenceEnd) -> ChoiceEnd:
        assert self.reason is not None, "it has an end"
        stop_string = self._detokenizer.matched_stop
        return ChoiceEnd(self.reason, stop_string, end.stop_token_id, end.num_cached_tokens)


class LiveRequest:
    """A request under way. Iterating deltas() is reading it; close() ends it, whatever its state."""

    def __init__(
        self,
        request: GenerationRequest,
        decoder: TextDecoder,
        first_handle: int,
        close: Callable[["LiveRequest"], None],
        arrived_at: float = 0.0,
    ) -> None:
        """arrived_at: when the call came, in seconds of time.monotonic()."""
        self.request = request
        self.arrived_at = arrived_at
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        """When the last choice ended."""
        self.has_failed = False
        """Whether its client gets an error instead of what is left."""
        self.first_handle = first_handle
        self._decoder = decoder
        self.is_streaming = request.max_reply_bytes is None
        self._close = close
        self.has_news = asyncio.Event()
        self.error: TandemError | None = None
        self.choices = [
            Choice(self, index, _detokenizer(request, decoder, stops))
            for stops in [StopStrings(request.stop_strings)]
            for index in range(request.num_choices)
        ]
        self.num_running = len(self.choices)
        self.num_cached_tokens = 0
        sampling = request.first.sampling
        num_logprobs, num_requested = sampling.num_logprobs, len(request.first.lists.logprob_token_ids)
        self._bytes_per_token = TOKEN_BYTES
        if num_logprobs is not None:
            self._bytes_per_token += logprob_bytes(num_logprobs, num_requested)
        self._prompt: PromptReports | None = None
        if sampling.num_prompt_logprobs is not None:
            self._prompt = PromptReports(request.first.prompt_token_ids, sampling.num_prompt_logprobs)
        num_entries = 1 + max((num_logprobs or 0) + num_requested, sampling.num_prompt_logprobs or 0)
        # A token's text has up to three bytes for each of the token's own.
        delta_bytes = num_entries * (ENTRY_BYTES + 4 * decoder.speller.longest)
        self._tokens_per_delta = max(1, min(MAX_TOKENS_PER_DELTA, MAX_DELTA_BYTES // delta_bytes))
        # These count what the choices hold, so both are zero when a request has ended and been read or closed. The
        # characters are those of text that was made before it was taken.
        self.num_unread_tokens = 0
        self.num_unread_characters = 0
        self._is_dropped = False
        if request.max_reply_bytes is None:
            self.max_unread_bytes = self.max_unread_characters = MAX_UNREAD_BYTES
            self.max_unread_tokens = MAX_UNREAD_BYTES // self._bytes_per_token
        else:
            self.max_unread_bytes = self.max_unread_characters = request.max_reply_bytes
            self.max_unread_tokens = request.max_reply_bytes // min_reply_size(num_logprobs, num_requested)

    @property
    def num_output_tokens(self) -> int:
        return sum(choice.num_output_tokens for choice in self.choices)

    @property
    def num_unread_bytes(self) -> int:
        num_prompt_bytes = self._prompt.num_unread_bytes if self._prompt is not None else 0
        return self.num_unread_tokens * self._bytes_per_token + self.num_unread_characters + num_prompt_bytes

    def too_large(self) -> OutputTooLarge:
        """The error of a request that holds more than it may."""
        if self.request.max_reply_bytes is not None:
            return reply_too_large(self.request.max_reply_bytes)
        return OutputTooLarge(f"the stream's reader is {self.num_unread_bytes} bytes behind")

    def add_prompt_logprobs(self, report: PromptLogprobs) -> None:
        assert self._prompt is not None, "a report that was not asked for"
        self._prompt.add(report)

    @property
    def spell(self) -> Callable[[int], tuple[bytes, str]]:
        """TokenSpeller.spell of the model's tokenizer."""
        return self._decoder.speller.spell

    def drop_unread(self) -> None:
        """Forgets the output that was not taken. Nothing more is given out, so the caller ends the request."""
        self._is_dropped = True
        for choice in self.choices:
            choice.drop()
        if self._prompt is not None:
            self._prompt.drop()
        self.num_unread_tokens = self.num_unread_characters = 0

    async def deltas(self) -> AsyncIterator[ChoiceDelta]:
        """The new output of the choices until all have ended: as it comes if the request streams, else all at the end.
        Raises the error that ended the request.
        """
        num_open = len(self.choices)
        while num_open:
            await self.has_news.wait()
            self.has_news.clear()
            if self.error is not None and not self.is_streaming:
                self._raise_error()
            # The engine reports a prompt before its first token, or with it.
            while self._prompt:
                max_tokens = self._tokens_per_delta if self.is_streaming else len(self._prompt)
                token_ids, logprobs = self._prompt.take(max_tokens)
                yield ChoiceDelta(0, "", token_ids, logprobs, None, is_prompt=True)
            for choice in self.choices:
                while choice.has_news:
                    delta = await self._take(choice)
                    num_open -= delta.end is not None
                    yield delta
            if self.error is not None:
                self._raise_error()

    def note_first_token(self, now: float) -> None:
        if self.first_token_at is None:
            self.first_token_at = now

    def outcome(self, now: float) -> RequestOutcome:
        """What came of the request, if its call ends now."""
        missing = FinishReason.ERROR if self.has_failed else FinishReason.ABORT
        return RequestOutcome(
            self.arrived_at,
            self.first_token_at,
            now if self.ended_at is None else self.ended_at,
            tuple((None if self.has_failed else choice.reason) or missing for choice in self.choices),
            tuple(choice.num_output_tokens for choice in self.choices),
        )

    def close(self) -> None:
        """Ends the request if it still runs. Its reader reads no further."""
        self._close(self)
        self.drop_unread()

    async def _take(self, choice: Choice) -> ChoiceDelta:
        max_tokens = self._tokens_per_delta if self.is_streaming else len(choice.token_ids)
        num_tokens, num_characters = len(choice.token_ids), choice.num_unread_characters
        try:
            if choice.num_undecoded(max_tokens) < MIN_IDS_WITHOUT_GIL:
                delta = choice.take(max_tokens)
            else:
                delta = await self._decoder.away(choice.take, max_tokens)
        except BaseException as error:
            raise text_failure("the tokenizer failed on the output", error) from error
        if self._is_dropped:
            # The request was dropped while a thread took the delta, which may therefore lack output.
            self._raise_error()
        self.num_unread_tokens -= num_tokens - len(choice.token_ids)
        self.num_unread_characters -= num_characters
        return delta

    def _raise_error(self) -> None:
        """Leaves no cycle of the request, its error and the frames that the error passes, which would stay until the
        garbage collector runs.
        """
        assert self.error is not None
        try:
            raise self.error
        finally:
            self.error = None


def _detokenizer(request: GenerationRequest, decoder: TextDecoder, stops: StopStrings) -> Detokenizer:
    return Detokenizer(
        decoder,
        stops,
        skip_special_tokens=request.skip_special_tokens,
        include_stop_string=request.include_stop_string,
        min_tokens=request.first.sampling.min_tokens,
    )


def reply_too_large(limit: int) -> OutputTooLarge:
    return OutputTooLarge(f"the reply is larger than the {limit} bytes that may be sent at once: {REPLY_ADVICE}")
