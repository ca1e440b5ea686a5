"""Text to token ids, off the event loop, with bounds: on each text, and on all that is being tokenized at once.

Short texts have a thread of their own, so that none waits for a long one. A long text is tokenized in pieces
(splitter.py), between which other long texts have their turn, until it has more tokens than are allowed. A text
that can't be split safely is tokenized whole.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from tandem_scheduler.front_end.text.patient_threads import PatientThreads
from tandem_scheduler.front_end.text.splitter import pieces, read_traits
from tandem_scheduler.front_end.text.tokenizer_faults import text_failure
from tandem_shared.errors import FieldViolation, InvalidRequest, QueueFull
from tandem_shared.step_plan import Int32Array

INLINE_CHARACTERS = 1024
"""Texts of up to this length take about a millisecond and are tokenized in the event loop."""

PIECE_CHARACTERS = 32 * 1024
"""Texts that are longer than this are split into pieces of about this length. A piece takes some 30 ms."""

MAX_PIECE_CHARACTERS = 256 * 1024
"""The longest piece where a text has no place to cut. The library takes up to 200 bytes of memory per character while
it works, and half a second for one word of this length."""

MAX_BYTES_AT_ONCE = 16 * 1024 * 1024
"""The limit of the texts of one lane that wait or are being tokenized, all together."""

T = TypeVar("T")


class _Lane:
    """One thread, and a limit on the text that it tokenizes or that waits for it."""

    def __init__(self, name: str) -> None:
        self._thread = PatientThreads(1, name)
        self._num_bytes = 0

    async def run(self, num_bytes: int, work: Callable[["_Lane"], Any]) -> Any:
        """Awaits work(lane). Raises QueueFull where the lane has too much to do."""
        if self._num_bytes + num_bytes > max(num_bytes, MAX_BYTES_AT_ONCE):
            raise QueueFull("too much text is being tokenized")
        self._num_bytes += num_bytes
        try:
            return await work(self)
        finally:
            self._leave(num_bytes)

    async def call(self, function: Callable[..., T], texts: Sequence[str], *args: Any) -> T:
        """Has the thread call function(texts, *args). If this is cancelled meanwhile, the thread still reads the texts
        to their end, so they count until then, whatever becomes of the work that they were part of.
        """
        reading = await self._thread.start(function, texts, *args)
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            num_bytes = sum(len(text.encode()) for text in texts)
            self._num_bytes += num_bytes
            reading.add_done_callback(lambda _: self._leave(num_bytes))
            raise

    def _leave(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes


class TextEncoder:
    """The encoding side of one tokenizer, for all calls of a front end."""

    def __init__(self, tokenizer: Tokenizer, token_lengths: Int32Array | None = None) -> None:
        """token_lengths: the result of splitter.token_lengths(), if it is there already."""
        self._tokenizer = tokenizer
        self._traits = read_traits(tokenizer, token_lengths)
        self._short_texts = _Lane("short-texts")
        self._long_texts = _Lane("long-texts")

    async def encode(self, field: str, text: str, *, max_tokens: int, add_special_tokens: bool = True) -> Int32Array:
        """Token ids, max_tokens at most. Raises InvalidRequest with `field` where the text has more or can't be
        tokenized, QueueFull, and TextFailed.
        """
        num_bytes = self._check_size(field, text, max_tokens)
        if len(text) <= INLINE_CHARACTERS:
            ids = self._encode_now(text, add_special_tokens)
        elif len(text) <= PIECE_CHARACTERS:
            [ids] = await self._short_texts.run(
                num_bytes, lambda lane: lane.call(self._encode_released, [text], add_special_tokens)
            )
        else:
            ids = await self._long_texts.run(
                num_bytes, lambda lane: self._encode_long(lane, field, text, max_tokens, add_special_tokens)
            )
        if len(ids) > max_tokens:
            raise _too_long(field, f"{len(ids)} tokens or more are over the {max_tokens} that are left for it")
        return ids

    async def encode_each(self, field: str, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each of several texts, without special tokens. Their lengths have been checked. Raises
        InvalidRequest with `field` and the text's index, QueueFull, and TextFailed.
        """
        num_bytes = sum(_num_bytes(f"{field}[{index}]", text) for index, text in enumerate(texts))
        if num_bytes <= INLINE_CHARACTERS:
            ids = self._encode_released(texts, False)
        else:
            ids = await self._short_texts.run(num_bytes, lambda lane: lane.call(self._encode_released, texts, False))
        return [each.tolist() for each in ids]

    def _check_size(self, field: str, text: str, max_tokens: int) -> int:
        """The text's size in bytes. Raises InvalidRequest where that alone says that the text is too long."""
        per_token = self._traits.max_bytes_per_token
        # Counted in characters first: a count of bytes makes a copy.
        num_bytes = len(text)
        if per_token is None or num_bytes <= max_tokens * per_token:
            num_bytes = _num_bytes(field, text)
        if per_token is not None and num_bytes > max_tokens * per_token:
            raise _too_long(field, f"{num_bytes} bytes or more of text are over {max_tokens} tokens")
        return num_bytes

    async def _encode_long(
        self, lane: _Lane, field: str, text: str, max_tokens: int, add_special_tokens: bool
    ) -> Int32Array:
        if not self._traits.can_split:
            [ids] = await lane.call(self._encode_released, [text], add_special_tokens)
            return ids
        parts: list[Int32Array] = []
        num_tokens = 0
        for piece in pieces(text, PIECE_CHARACTERS, MAX_PIECE_CHARACTERS):
            if piece is None:
                description = (
                    f"has over {MAX_PIECE_CHARACTERS} characters without a space or a punctuation mark after a word"
                )
                raise InvalidRequest(FieldViolation(field, description))
            parts += await lane.call(self._encode_released, [piece], add_special_tokens)
            num_tokens += len(parts[-1])
            if num_tokens > max_tokens:
                break
        return np.concatenate(parts)

    def _encode_now(self, text: str, add_special_tokens: bool) -> Int32Array:
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, np.int32)
        except BaseException as error:
            raise text_failure("the tokenizer failed on the text", error) from error

    def _encode_released(self, texts: Sequence[str], add_special_tokens: bool) -> list[Int32Array]:
        """Tokenizes without holding the GIL, which only the library's batched calls release."""
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [np.array(encoding.ids, np.int32) for encoding in encodings]
        except BaseException as error:
            raise text_failure("the tokenizer failed on the text", error) from error


def _num_bytes(field: str, text: str) -> int:
    """The text's size in UTF-8. Raises InvalidRequest for a text that has none."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(FieldViolation(field, "has characters that are not Unicode text")) from error


def _too_long(field: str, description: str) -> InvalidRequest:
    return InvalidRequest(FieldViolation(field, description))
