"""The model's tokenizer. Knows `tokenizers`, never transformers or torch."""

from pathlib import Path

from tokenizers import Tokenizer

from shared.errors import ModelError


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    # What the library raises for a missing or malformed file is a bare Exception.
    except Exception as error:
        raise ModelError(f"{path}: {error}") from error
