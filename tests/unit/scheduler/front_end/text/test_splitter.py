"""Pieces' ids, joined, against the tokenizer's own ids of the whole text; the bounds against Unicode's own data.

QWEN3_TOKENIZER names one more tokenizer.json to try. The real one of Qwen3 is too large to be kept here.
"""

import os
import re
import sys
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from tandem_scheduler.front_end.text.splitter import BREAK, NFC_SHRINKS_BY, UNKNOWN, WORD, pieces, read_traits
from tests.support.tokenizers import byte_fallback, embedded, qwen3_like

TOKENIZERS = {"embedded": embedded(), "like Qwen3's": qwen3_like()}
if "QWEN3_TOKENIZER" in os.environ:
    TOKENIZERS["given"] = Tokenizer.from_file(os.environ["QWEN3_TOKENIZER"])

all_tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)

# Characters that the expressions treat differently, that NFC joins, and added tokens, whole and broken.
PARTS = [
    *"aZé09_<>|/'\"!,.;-()\t\n\r  一。\uff0cひ가ᄀ",
    "\u0301",
    "\u0338",
    "\u1161",
    "\u11a8",
    "\u3099",
    "\u00a0",
    "\u200d",
]
PARTS += ["'s", "'LL", "\r\n", "😀", "<|im_start|>", "<|im", "<think>", "<|endoftext|>", "don't", " the", "\u017f", "Å"]
texts = st.lists(st.one_of(st.sampled_from(PARTS), st.characters(exclude_categories=["Cs"]))).map("".join)


def joined_ids(tokenizer: Tokenizer, text: str, size: int) -> list[int]:
    return [token_id for piece in pieces(text, size, len(text) + 1) for token_id in tokenizer.encode(piece or "").ids]


@all_tokenizers
@settings(max_examples=300, deadline=None)
@given(text=texts, size=st.integers(1, 8))
@example(text="a\n\nb \n c  1 2, 3<|im_start|>a <|im_end|>", size=1)
def test_the_pieces_ids_joined_are_the_ids_of_the_whole(tokenizer: Tokenizer, text: str, size: int) -> None:
    assert joined_ids(tokenizer, text, size) == tokenizer.encode(text).ids


@all_tokenizers
def test_every_cut_of_a_word_and_a_break_is_safe(tokenizer: Tokenizer) -> None:
    words = [chr(c) for c in range(0x10000) if re.match(f"[{WORD}]", chr(c))]
    breaks = [chr(c) for c in range(0x10000) if re.match(f"[{BREAK}]", chr(c))]
    for character in breaks:
        for rest in ("", "a", " ", "\n", "1", "\u0338", "s"):
            for word in ("a", "1", "'s", "é", "가", "一"):
                left, right = "x " + word, character + rest
                assert tokenizer.encode(left).ids + tokenizer.encode(right).ids == tokenizer.encode(left + right).ids
    for index in range(0, len(words), 50):
        left, right = "".join(words[index : index + 50]), " a"
        assert tokenizer.encode(left).ids + tokenizer.encode(right).ids == tokenizer.encode(left + right).ids


def test_words_are_letters_and_digits_and_breaks_are_not() -> None:
    for code in range(0x10000):
        character = chr(code)
        if re.match(f"[{WORD}]", character):
            assert unicodedata.category(character)[0] in "LN", hex(code)
            assert unicodedata.category(unicodedata.normalize("NFC", character))[0] in "LN", hex(code)
        if re.match(f"[{BREAK}]", character):
            assert unicodedata.category(character)[0] in "PZC" and unicodedata.combining(character) == 0
            # It combines with nothing before it, as no composition has it as its second part.
            assert unicodedata.normalize("NFD", character) == character
    compositions = filter(None, (unicodedata.decomposition(chr(code)) for code in range(sys.maxunicode + 1)))
    seconds = [
        chr(int(parts[1], 16)) for parts in map(str.split, compositions) if len(parts) == 2 and parts[0][0] != "<"
    ]
    assert len(seconds) > 900 and not any(re.match(f"[{BREAK}]", second) for second in seconds)


@all_tokenizers
def test_pieces_are_about_as_long_as_asked_for(tokenizer: Tokenizer) -> None:
    text = "Good morrow, cousin. " * 1000
    lengths = [len(piece or "") for piece in pieces(text, 2000, 4000)]
    assert sum(lengths) == len(text) and max(lengths) <= 2000 and min(lengths[:-1]) > 1900


def test_what_has_no_place_to_cut_is_told() -> None:
    assert list(pieces("a b" + "x" * 100, 10, 50)) == ["a", None]
    assert list(pieces("x" * 60, 10, 50)) == [None]
    assert list(pieces("x" * 50, 10, 50)) == ["x" * 50]
    assert list(pieces("x" * 30 + " y", 10, 50)) == ["x" * 30, " y"]


def test_what_a_token_is_at_most_is_known() -> None:
    longest = max(len(token.encode()) for token in embedded().get_vocab())
    assert read_traits(embedded()).max_bytes_per_token == longest
    assert read_traits(qwen3_like()).max_bytes_per_token == NFC_SHRINKS_BY * longest
    assert read_traits(embedded()).can_split and read_traits(qwen3_like()).can_split


def test_nfc_shrinks_by_less_than_its_factor() -> None:
    """For each character in normal form, the longest text that normalises to it."""
    longest_raw: dict[str, int] = {}
    # All composed characters, the first thousand, and of Hangul, which is regular, the jamo and a hundred syllables.
    composed = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.decomposition(chr(c))]
    characters = [*composed, *map(chr, range(1000)), *map(chr, range(0x1100, 0x1200)), *map(chr, range(0xAC00, 0xAC64))]
    characters += {part for character in composed for part in unicodedata.normalize("NFD", character)}
    for character in characters:
        decomposed = unicodedata.normalize("NFD", character)
        longest_raw[decomposed] = max(longest_raw.get(decomposed, 0), len(character.encode()))

    def longest(decomposed: str) -> int:
        """The longest of all ways to write a text as decomposable characters."""
        best = [0] * (len(decomposed) + 1)
        for start in reversed(range(len(decomposed))):
            ends = [e for e in range(start + 1, len(decomposed) + 1) if decomposed[start:e] in longest_raw]
            best[start] = max(longest_raw[decomposed[start:e]] + best[e] for e in ends)
        return best[0]

    for character in characters:
        if unicodedata.normalize("NFC", character) == character:
            raw = longest(unicodedata.normalize("NFD", character))
            assert raw < NFC_SHRINKS_BY * len(character.encode()), hex(ord(character))


def test_a_tokenizer_that_is_not_wholly_known_is_not_split() -> None:
    lowercase, prefixed, greedy, cut = embedded(), embedded(), embedded(), embedded()
    lowercase.normalizer = normalizers.Lowercase()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    greedy.add_tokens([AddedToken("<mask>", lstrip=True)])
    cut.add_tokens(["two words"])
    unknown = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    for tokenizer in (lowercase, prefixed, greedy, cut, unknown, byte_fallback()):
        assert read_traits(tokenizer) == UNKNOWN
