"""Where a model's files are: a folder, the one inside the package, or a download from the hub. Reads no weights.

Only regular files of a folder are opened (symbolic links to them are: the hub's cache has nothing else). Opening a FIFO
would wait for a writer for ever, and reading a device may never end.
"""

import importlib.resources
import os
import stat
from pathlib import Path
from typing import BinaryIO

import xxhash

from tandem_shared.errors import ModelError

EMBEDDED_MODEL = "embedded"

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = [TOKENIZER_FILE, "tokenizer_config.json", "generation_config.json", "config.json"]
MAX_JSON_BYTES = 64 << 20
"""How large any JSON file of a model may be. The largest real ones are vocabularies, of some ten MiB, and to read a
file may take many times its size in memory.
"""
ALL_FILES = [*TOKENIZER_FILES, "*.safetensors", "model.safetensors.index.json"]


def resolve_model(name: str, files: list[str]) -> Path:
    """The folder of a model: `name` if that is a folder, the embedded model, else the hub's files of that id.

    Raises ModelError where there is none.
    """
    folder = Path(name)
    try:
        is_folder = name != "" and folder.is_dir()
    except OSError as error:
        raise ModelError(f"{name[:200]}: {error.strerror}") from error
    if is_folder:
        return folder
    if name == EMBEDDED_MODEL:
        return Path(str(importlib.resources.files("tandem"))) / "embedded_model"
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"{name[:200] or repr(name)}: no such folder, and no hub id of the form OWNER/NAME")
    # Slow to import, and most models are folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{name}: no such folder, and the hub gave nothing: {error}") from error


def open_regular(path: Path) -> BinaryIO:
    """The file, open for reading. ModelError, naming it, where it is missing, unreadable or no regular file."""
    try:
        # A device is not even opened; the second look is at what was opened, should the name have changed hands.
        _check_regular(path, path.stat().st_mode)
        file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 (the caller closes it)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except ModelError:
        file.close()
        raise
    return file


def read_json_bytes(path: Path) -> bytes:
    """The contents of one of a model's JSON files. Raises ModelError, which names the file, where open_regular() does
    and where the file is larger than MAX_JSON_BYTES.
    """
    with open_regular(path) as file:
        try:
            contents = file.read(MAX_JSON_BYTES + 1)
        except OSError as error:
            raise ModelError(f"{path}: {error}") from error
    if len(contents) > MAX_JSON_BYTES:
        raise ModelError(f"{path}: is larger than {MAX_JSON_BYTES >> 20} MiB")
    return contents


def exists(path: Path) -> bool:
    """Whether there is something of that name, be it a dangling symbolic link: reading that is an error."""
    return os.path.lexists(path)


def check_regular(path: Path) -> None:
    """Raises as open_regular does, for a file that a library opens by its name."""
    open_regular(path).close()


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path}: is no regular file")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def tokenizer_digest(folder: Path) -> str:
    """A digest (xxh3_128, hexadecimal) of tokenizer.json's bytes, "" where the folder has none.

    Two services with equal digests read the same ids out of a text. Raises what read_json_bytes() raises.
    """
    path = folder / TOKENIZER_FILE
    return xxhash.xxh3_128_hexdigest(read_json_bytes(path)) if exists(path) else ""
