"""The model's tokenizer. Knows `tokenizers`, never transformers or torch."""

import asyncio
from pathlib import Path

from tokenizers import Tokenizer

from shared.errors import ModelError
from shared.model_folder import TOKENIZER_FILE, open_regular
from shared.rust_panic import is_rust_panic

INLINE_CHARACTERS = 4096
"""Texts up to this long take well under a millisecond and are encoded in place; longer ones in a thread."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, without the truncation and padding that some training runs leave in the file: what is
    read of a prompt is all of it, and nothing else. ModelError, naming the file, where it can't be read.
    """
    path = folder / TOKENIZER_FILE
    with open_regular(path) as file:
        contents = file.read()
    try:
        tokenizer = Tokenizer.from_buffer(contents)
    except BaseException as error:
        # What the library raises for a malformed file is a bare Exception or a panic.
        if not isinstance(error, Exception) and not is_rust_panic(error):
            raise
        raise ModelError(f"{path}: {str(error)[:500]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids. A long text must not hold up the steps of others."""
    if len(text) <= INLINE_CHARACTERS:
        encoding = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    else:
        # Of the library's calls only the batched ones let go of the GIL.
        [encoding] = await asyncio.to_thread(tokenizer.encode_batch_fast, [text], add_special_tokens=add_special_tokens)
    return list(encoding.ids)
