"""Turns tokens into text as they come, and finds stop strings in it. Knows one sequence's output, nothing of requests.

Text is certain, and given out, once no later token can change it. What later tokens can change depends on the decoder:

- Byte-level: a token is some bytes of UTF-8, so only an incomplete character at the end is uncertain. It decodes to
  U+FFFD. Each certain text is decoded by itself.
- Byte fallback (Llama 2 and its like): bytes that no token has are tokens of their own. A run of them is decoded
  together, into U+FFFD for each if the run is not UTF-8, so all of it is uncertain until a token of another kind.
- Others may treat the first token apart (a space left out), so text is decoded together with the tokens before it,
  whose own text is then cut off. Where that does not begin the text, nothing less than all tokens gives the right text.
"""

import json
from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tokenizers import Tokenizer

from tandem_scheduler.front_end.text.patient_threads import PatientThreads
from tandem_scheduler.front_end.text.splitter import token_lengths
from tandem_scheduler.front_end.text.stop_strings import START, StopStrings
from tandem_scheduler.front_end.text.token_spelling import TokenSpeller
from tandem_shared.step_plan import Int32Array

UNFINISHED = "\ufffd"

LONGEST_CHARACTER = 4
"""The most bytes of one character in UTF-8."""

MAX_UNCERTAIN = 16
"""So many byte-level tokens may be uncertain together before a place to cut is looked for."""

MIN_IDS_WITHOUT_GIL = 512
"""So many ids or more are decoded by a call that releases the GIL. For fewer ids it costs more than the plain call."""

DECODING_THREADS = 4

T = TypeVar("T")


class TextDecoder:
    """The decoding side of one tokenizer: what all sequences share."""

    def __init__(self, tokenizer: Tokenizer, lengths: Int32Array | None = None) -> None:
        """lengths: the result of splitter.token_lengths(), if it is there already."""
        self.tokenizer = tokenizer
        self._threads = PatientThreads(DECODING_THREADS, "decoding")
        decoder = tokenizer.decoder
        state = json.loads(decoder.__getstate__()) if decoder is not None else {}
        self.is_byte_level = state.get("type") == "ByteLevel"
        parts = state.get("decoders", [state])
        has_bytes = any(part.get("type") == "ByteFallback" for part in parts)
        names = {f"<0x{byte:02X}>": byte for byte in range(256)} if has_bytes else {}
        byte_ids = {i: byte for name, byte in names.items() if (i := tokenizer.token_to_id(name)) is not None}
        self._byte_ids = frozenset(byte_ids)
        added = tokenizer.get_added_tokens_decoder().items()
        # Made here, because it takes too long for the event loop of a server that has calls.
        lengths = token_lengths(tokenizer) if lengths is None else lengths
        self._token_sizes = _sizes_of_tokens(tokenizer, lengths) if self.is_byte_level else None
        has_byte_level = any(part.get("type") == "ByteLevel" for part in parts)
        self.speller = TokenSpeller(tokenizer, lengths, is_byte_level=has_byte_level, bytes_of_ids=byte_ids)
        self._special_ids = (
            frozenset(token_id for token_id, token in added if token.special) if has_bytes else frozenset()
        )

    def min_text_bytes(self, token_ids: Int32Array, *, skip_special_tokens: bool) -> int:
        """The fewest bytes that the text of the ids can have, without decoding them; 0 if that is not known."""
        if self._token_sizes is None:
            return 0
        sizes = self._token_sizes[token_ids]
        return int(sizes[sizes > 0].sum() if skip_special_tokens else abs(sizes).sum())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        if len(token_ids) < MIN_IDS_WITHOUT_GIL:
            text: str = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        else:
            [text] = self.tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return text

    async def decode_away(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """decode(), in a thread if there are many ids."""
        if len(token_ids) < MIN_IDS_WITHOUT_GIL:
            return self.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return await self.away(lambda: self.decode(token_ids, skip_special_tokens=skip_special_tokens))

    async def away(self, function: Callable[..., T], *args: Any) -> T:
        """Calls a function that decodes much text, in a thread. A call that is cancelled before its turn leaves nothing
        behind.
        """
        return await self._threads.call(function, *args)

    def extends_a_run(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether a run of byte tokens goes on with this token: a byte token, or a special token that is left out."""
        return token_id in self._byte_ids or (skip_special_tokens and token_id in self._special_ids)


def _sizes_of_tokens(tokenizer: Tokenizer, lengths: Int32Array) -> Int32Array:
    """The size in bytes of each token of a byte-level vocabulary, where one character stands for one byte. Sizes of
    special tokens are negative.
    """
    sizes = lengths.copy()
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        if token_id < len(sizes):
            sizes[token_id] = -len(token.content) if token.special else len(token.content)
    return sizes


class Detokenizer:
    """Makes text of one sequence's tokens. The parts that it returns, joined, are the output up to the first stop
    string, or to its end.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        stop_strings: StopStrings | None = None,
        *,
        skip_special_tokens: bool,
        include_stop_string: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """include_stop_string: the stop string that is found is part of the text. min_tokens: a stop string counts only
        if text that comes with a later token than this completes it.
        """
        self._decoder = decoder
        self._includes_stop = include_stop_string
        self._num_passed_over = min_tokens
        self._skip_special_tokens = skip_special_tokens
        self._stop_strings = stop_strings or StopStrings(())
        self._node = START
        # Text that may be the start of a stop string.
        self._held = ""
        self.matched_stop: str | None = None
        self._num_tokens = 0
        # Tokens whose text is not certain. Then the tokens before them and their text, unless the decoder is
        # byte-level.
        self._uncertain: list[int] = []
        self._context: list[int] = []
        self._context_text = ""
        # All tokens, unless the decoder is byte-level.
        self._all_ids = array("i")
        self._num_decoded = 0

    @property
    def has_stop_strings(self) -> bool:
        return bool(self._stop_strings)

    def add(self, token_id: int) -> str:
        """The text that has become certain with this token. After a stop string was found, there is no more text."""
        self._uncertain.append(token_id)
        self._num_tokens += 1
        decoder = self._decoder
        if decoder.is_byte_level:
            text = self._decode(self._uncertain)
            if text and not text.endswith(UNFINISHED):
                self._uncertain.clear()
                return self._release(text)
            return self._release(self._cut_uncertain()) if len(self._uncertain) >= MAX_UNCERTAIN else ""
        self._all_ids.append(token_id)
        if decoder.extends_a_run(token_id, skip_special_tokens=self._skip_special_tokens):
            return ""
        text = self._decode(self._context + self._uncertain)
        if len(text) <= len(self._context_text) or text.endswith(UNFINISHED):
            return ""
        new_text = self._after_context(text)
        self._context, self._uncertain = self._uncertain, []
        self._context_text = self._decode(self._context)
        return self._release(new_text)

    def finish(self, last_token_ids: Sequence[int] = ()) -> str:
        """The text of the last tokens, which is cheaper than adding them, and the text that was held back: a possible
        stop string, an incomplete character.
        """
        if self.matched_stop is not None:
            return ""
        self._num_tokens += len(last_token_ids)
        if not self._decoder.is_byte_level:
            self._all_ids.extend(last_token_ids)
        uncertain = [*self._context, *self._uncertain, *last_token_ids]
        delta = self._release(self._after_context(self._decode(uncertain))) if uncertain else ""
        if self.matched_stop is None:
            delta += self._held
        return delta

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _after_context(self, text: str) -> str:
        """The part of a text after the context with which it was decoded."""
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(self._all_ids)[self._num_decoded :]

    def _cut_uncertain(self) -> str:
        """The certain text of many byte-level tokens that end with bytes that are not a character, which a model may
        give for ever. Where both sides of a cut decode apart to the same text as together, the cut is not inside a
        character. What later tokens can change is in the last bytes.
        """
        text, ids = self._decode(self._uncertain), self._uncertain
        for cut in range(len(ids) - LONGEST_CHARACTER, 0, -1):
            certain = self._decode(ids[:cut])
            if certain + self._decode(ids[cut:]) == text:
                self._uncertain = ids[cut:]
                return certain
        return ""

    def _release(self, text: str) -> str:
        self._num_decoded += len(text)
        if not self._stop_strings:
            return text
        all_held = self._held + text
        if self._num_tokens <= self._num_passed_over:
            self._node = self._stop_strings.pass_over(text, self._node)
        else:
            self._node, stop, end = self._stop_strings.find(text, self._node)
            if stop is not None:
                self.matched_stop = stop
                return all_held[: len(self._held) + end - (0 if self._includes_stop else len(stop))]
        cut = len(all_held) - self._stop_strings.held(self._node)
        self._held = all_held[cut:]
        return all_held[:cut]
