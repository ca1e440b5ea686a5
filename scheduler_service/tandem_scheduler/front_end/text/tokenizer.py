"""The model's tokenizer. Knows `tokenizers`, never transformers or torch."""

from pathlib import Path

from tokenizers import Tokenizer

from tandem_shared.errors import ModelError
from tandem_shared.model_folder import TOKENIZER_FILE, read_json_bytes
from tandem_shared.rust_panic import is_rust_panic


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, without the truncation and padding that some training runs leave in the file: what is
    read of a prompt is all of it, and nothing else. ModelError, naming the file, where it can't be read.
    """
    path = folder / TOKENIZER_FILE
    contents = read_json_bytes(path)
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
