"""Where a text may be cut so that its pieces' token ids, joined, are those of the whole. Knows tokenizer.json's parts.

The tokenizers that this module knows work in four stages: added tokens are found in the text, what is between them is
normalised (NFC), a regular expression splits that into words, and byte-level BPE turns each word into ids by itself. A
cut is safe where no added token spans it, where normalisation does not reach across it, and where the expression ends a
word whatever follows and starts one whatever came before.

All of that holds between a letter or digit (WORD below) and white space or punctuation (BREAK below):
- No alternative of the known expressions goes from a letter or a digit to something that is neither: those that take
  letters or digits end with them, the others take none. So a word ends there, and a cut changes neither what comes
  before (a run of letters ends at the end of the text as it ends at BREAK; `(?!\\S)` is only asked after white space)
  nor what comes after (the expressions never look back).
- A character of BREAK is its own normal form and combines with nothing before it, so NFC of the pieces is NFC of the
  whole. It may combine with what follows it ('<' with U+0338), but never to a letter or a digit.
- WORD has only scripts whose characters are letters or digits in every version of Unicode that the libraries may have.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE

from tandem_shared.step_plan import Int32Array

WORD = (
    "0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0391-\u03a1\u03a3-\u03f5\u0410-\u044f"
    "\u05d0-\u05ea\u0620-\u064a\u0e01-\u0e30\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
# None that is in the added tokens of known models, as < > | _ and / are.
BREAK = r"\t\n\r !\"'(),.:;?\-" + "\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
CUT = re.compile(f"[{WORD}](?=[{BREAK}])")

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NFC_SHRINKS_BY = 4
"""NFC makes a text shorter by less than this factor, in bytes of UTF-8; the most is 3.5, at U+0390."""

SEARCH_CHARACTERS = 1024


@dataclass(frozen=True)
class TokenizerTraits:
    """can_split: the text may be cut as this module says. max_bytes_per_token: text of more bytes than this times n has
    more than n tokens; None where that is not known.
    """

    can_split: bool
    max_bytes_per_token: int | None


UNKNOWN = TokenizerTraits(can_split=False, max_bytes_per_token=None)


def token_lengths(tokenizer: Tokenizer) -> Int32Array:
    """The characters of each token of the vocabulary, by id; 0 for an id that has none. Takes about a microsecond a
    token.
    """
    size = tokenizer.get_vocab_size()
    return np.fromiter((len(tokenizer.id_to_token(token_id) or "") for token_id in range(size)), np.int32, size)


def read_traits(tokenizer: Tokenizer, lengths: Int32Array | None = None) -> TokenizerTraits:
    """The traits of a tokenizer; UNKNOWN for any that this module does not wholly understand. lengths: the result of
    token_lengths(), if it is there already.
    """
    model, normalizer = tokenizer.model, _state(tokenizer.normalizer)
    if not isinstance(model, BPE) or not _is_byte_level_bpe(tokenizer, model):
        return UNKNOWN
    if normalizer not in (None, {"type": "NFC"}) or not _has_known_words(_state(tokenizer.pre_tokenizer)):
        return UNKNOWN
    added = tokenizer.get_added_tokens_decoder().values()
    # A token that takes the white space beside it, too, may be of any length.
    if any(token.lstrip or token.rstrip or token.single_word or CUT.search(token.content) for token in added):
        return UNKNOWN
    # In a byte-level vocabulary a character stands for a byte.
    if lengths is None:
        lengths = token_lengths(tokenizer)
    longest = max(int(lengths.max()), max((len(token.content.encode()) for token in added), default=0))
    factor = 1 if normalizer is None else NFC_SHRINKS_BY
    return TokenizerTraits(tokenizer.num_special_tokens_to_add(False) == 0, longest * factor)


def pieces(text: str, size: int, max_size: int) -> Iterator[str | None]:
    """The text in pieces of about `size` characters, cut where it is safe. Ends with None where the next piece would
    have more than max_size.
    """
    start = 0
    while len(text) - start > size:
        cut = _last_cut(text, start, start + size) or _first_cut(text, start + size, start + max_size)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:] if len(text) - start <= max_size else None


def _last_cut(text: str, start: int, end: int) -> int | None:
    """The last safe cut in text[start:end], of those in its last SEARCH_CHARACTERS."""
    last = None
    for match in CUT.finditer(text, max(start, end - SEARCH_CHARACTERS), end):
        last = match.end()
    return last


def _first_cut(text: str, start: int, end: int) -> int | None:
    match = CUT.search(text, start, end)
    return match.end() if match else None


def _is_byte_level_bpe(tokenizer: Tokenizer, model: BPE) -> bool:
    alphabet = {*map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144)])}
    return (
        not model.dropout
        and model.unk_token is None
        and not model.byte_fallback
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
        # All 256 bytes: one without a token would vanish from the text, however long.
        and all(tokenizer.token_to_id(character) is not None for character in alphabet)
    )


def _has_known_words(pre_tokenizer: Any) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return bool(pattern == QWEN_PATTERN)
    return False


def _state(part: Any) -> Any:
    """A tokenizer's part as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())
