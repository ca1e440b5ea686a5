"""Finds a model's files, in a folder, in the package or on the Hugging Face hub, and reads its JSON files.

Only regular files are opened, and symbolic links to them, which the hub's cache consists of. Opening a FIFO would wait
for a writer for ever, and reading a device may never end.
"""

import importlib.resources
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from tandem_shared.errors import ModelError

EMBEDDED_MODEL = "embedded"

TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILES = ["chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"]
TOKENIZER_FILES = [
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "generation_config.json",
    "config.json",
    *CHAT_TEMPLATE_FILES,
]
MAX_JSON_BYTES = 64 << 20
"""The size limit of a model's JSON files. The largest real ones are vocabularies of some ten MiB. Parsing a file may
take many times its size in memory.
"""
ALL_FILES = [*TOKENIZER_FILES, "*.safetensors", "model.safetensors.index.json"]


def resolve_model(name: str, files: list[str], revision: str = "") -> Path:
    """The folder of a model. `name` is a folder, "embedded", or a hub id, of which `files` (names and patterns) are
    downloaded, with a progress bar, unless the hub's cache has them. revision is a branch, tag or commit of a hub id.
    If the hub can't be reached, what the cache has is taken.

    Raises ModelError if there is no such folder and no such model on the hub, and for a revision of a folder.
    """
    if is_hub_id(name):
        return _download(name, files, revision)
    if revision:
        raise ModelError(f"{name[:200]}: is no hub id, so it has no revision {revision[:200]}")
    return Path(str(importlib.resources.files("tandem"))) / "embedded_model" if name == EMBEDDED_MODEL else Path(name)


def is_hub_id(name: str) -> bool:
    """Whether a model is on the hub, not in a folder or the package. Raises ModelError if it can be neither."""
    try:
        is_folder = name != "" and Path(name).is_dir()
    except OSError as error:
        raise ModelError(f"{name[:200]}: {error.strerror}") from error
    if is_folder or name == EMBEDDED_MODEL:
        return False
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"{name[:200] or repr(name)}: no such folder, and no hub id of the form OWNER/NAME")
    return True


def _download(name: str, files: list[str], revision: str) -> Path:
    # Imported here because the import is slow and most models are folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{name}: no such folder, and the hub gave nothing: {error}") from error


def open_regular(path: Path) -> BinaryIO:
    """The file, open for reading. Raises ModelError, naming the file, if it is missing, unreadable or not regular."""
    try:
        # Checked before opening, as opening a device may have effects, and again after, as the name may by then belong
        # to another file.
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
    """The contents of one of a model's JSON files. Raises ModelError, which names the file, if open_regular() does or
    the file is larger than MAX_JSON_BYTES.
    """
    with open_regular(path) as file:
        try:
            contents = file.read(MAX_JSON_BYTES + 1)
        except OSError as error:
            raise ModelError(f"{path}: {error}") from error
    if len(contents) > MAX_JSON_BYTES:
        raise ModelError(f"{path}: is larger than {MAX_JSON_BYTES >> 20} MiB")
    return contents


def read_json(path: Path, *, is_optional: bool = False) -> dict[str, Any]:
    """The JSON object that one of a model's files holds. If is_optional, an empty one where there is no such file.
    Raises ModelError, which names the file.
    """
    if is_optional and not exists(path):
        return {}
    try:
        values = json.loads(read_json_bytes(path))
    except RecursionError:
        raise ModelError(f"{path}: is nested too deeply") from None
    except MemoryError:
        raise ModelError(f"{path}: there is too little memory to read it") from None
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds no JSON object")
    return values


def exists(path: Path) -> bool:
    """Whether the name exists. It does if it is a dangling symbolic link, so that reading it is an error."""
    return os.path.lexists(path)


def check_regular(path: Path) -> None:
    """Raises what open_regular() raises. For a file that a library opens by its name."""
    open_regular(path).close()


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path}: is not a regular file")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def tokenizer_digest(folder: Path) -> str:
    """The xxh3_128 digest of tokenizer.json's bytes in hexadecimal, "" if the folder has no such file.

    Services with equal digests turn a text into the same ids. Raises what read_json_bytes() raises.
    """
    path = folder / TOKENIZER_FILE
    return xxhash.xxh3_128_hexdigest(read_json_bytes(path)) if exists(path) else ""
