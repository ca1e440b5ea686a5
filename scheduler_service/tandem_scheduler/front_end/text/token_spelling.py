"""The bytes and the text of single tokens, as log-probabilities show them. Knows nothing of requests."""

from functools import lru_cache

from tokenizers import Tokenizer

from tandem_shared.step_plan import Int32Array

MAX_KEPT = 16_384
"""How many tokens' spellings are kept, the latest ones; some 4 MB."""

SPACE_MARK = "\u2581"
"""What stands for a space in the vocabularies of SentencePiece."""


def _bytes_by_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as in GPT-2: printable characters of Latin-1
    stand for themselves, and characters from U+0100 on for the other bytes, in their order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTES = _bytes_by_character()


class TokenSpeller:
    """Spells the tokens of one vocabulary. Byte-level tokens are exactly the bytes that they add to a text, added
    tokens are their content, and a token of another vocabulary is what it adds in the middle of a text, as far as that
    can be said without the tokens around it.
    """

    def __init__(
        self, tokenizer: Tokenizer, lengths: Int32Array, *, is_byte_level: bool, bytes_of_ids: dict[int, int]
    ) -> None:
        """lengths: the result of splitter.token_lengths(). bytes_of_ids: the tokens that stand for single bytes."""
        self._tokenizer = tokenizer
        self._is_byte_level = is_byte_level
        self._bytes_of_ids = bytes_of_ids
        self._contents = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        added = max((len(content.encode()) for content in self._contents.values()), default=0)
        # A character of another vocabulary has up to four bytes.
        self.longest = max(int(lengths.max(initial=0)) * (1 if is_byte_level else 4), added)
        """The size in bytes that no token exceeds."""
        self.spell = lru_cache(MAX_KEPT)(self._spell)
        """token id -> its bytes, and these as text, with U+FFFD for what is not UTF-8. Both are empty for an id that
        has no token, such as the padding of a model's vocabulary.
        """

    def _spell(self, token_id: int) -> tuple[bytes, str]:
        spelled = self._bytes(token_id)
        return spelled, spelled.decode(errors="replace")

    def _bytes(self, token_id: int) -> bytes:
        if (content := self._contents.get(token_id)) is not None:
            return content.encode()
        if (byte := self._bytes_of_ids.get(token_id)) is not None:
            return bytes([byte])
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level and all(character in BYTES for character in token):
            return bytes(map(BYTES.__getitem__, token))
        return token.replace(SPACE_MARK, " ").encode()
