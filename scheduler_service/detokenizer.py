"""Tokens to text as they come, and stop strings in it. Knows one sequence's output, nothing of requests."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The deltas that it gives, joined, are the text of the output, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop_strings = tuple(stop_strings)
        self._longest_stop = max(map(len, stop_strings), default=0)
        self._token_ids: list[int] = []
        self._num_decoded = 0
        # Decoded, but perhaps the start of a stop string.
        self._held = ""
        self.matched_stop: str | None = None

    @property
    def has_stop_strings(self) -> bool:
        return bool(self._stop_strings)

    def add(self, token_id: int) -> str:
        """The text that is certain now. After a match there is no more."""
        self._token_ids.append(token_id)
        return self._release(self._stream.step(self._tokenizer, token_id) or "")

    def finish(self, last_token_ids: Sequence[int] = ()) -> str:
        """The text of the last tokens, which is cheaper than adding them, and what was held back: a possible stop
        string, an incomplete character.
        """
        if self.matched_stop is not None:
            return ""
        self._token_ids += last_token_ids
        text = self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        delta = self._release(text[self._num_decoded :])
        if self.matched_stop is None:
            delta += self._held
        return delta

    def _release(self, text: str) -> str:
        self._num_decoded += len(text)
        if not self._stop_strings:
            return text
        self._held += text
        matches = [
            (index + len(stop), index, stop) for stop in self._stop_strings if (index := self._held.find(stop)) >= 0
        ]
        if matches:
            # The first to be complete, however the text falls into tokens.
            _, index, self.matched_stop = min(matches)
            return self._held[:index]
        num_kept = self._num_to_hold()
        cut = len(self._held) - num_kept
        delta, self._held = self._held[:cut], self._held[cut:]
        return delta

    def _num_to_hold(self) -> int:
        """Length of the longest end of the held text that starts a stop string."""
        for length in range(min(len(self._held), self._longest_stop - 1), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop_strings):
                return length
        return 0
