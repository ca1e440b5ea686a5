"""The model's tokenizer. Knows `tokenizers`, never transformers or torch."""

import asyncio
from pathlib import Path

from tokenizers import Tokenizer

from shared.errors import ModelError

INLINE_CHARACTERS = 4096
"""Texts up to this long take well under a millisecond and are encoded in place; longer ones in a thread."""


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    # What the library raises for a missing or malformed file is a bare Exception.
    except Exception as error:
        raise ModelError(f"{path}: {error}") from error


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids. A long text must not hold up the steps of others."""
    if len(text) <= INLINE_CHARACTERS:
        encoding = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    else:
        # Of the library's calls only the batched ones let go of the GIL.
        [encoding] = await asyncio.to_thread(tokenizer.encode_batch_fast, [text], add_special_tokens=add_special_tokens)
    return list(encoding.ids)
