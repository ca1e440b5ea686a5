"""Changes of a valid model folder, of which the hostile ones are made."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"
Change = Callable[[Path], None]


def rewrite(name: str, contents: bytes, *, repeated: bytes = b"", count: int = 0, end: bytes = b"") -> Change:
    """Replaces a file by contents, then `count` times `repeated`, then end."""

    def change(folder: Path) -> None:
        # The file is a hard link to that of the valid folder, so it must not be written to.
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(contents + repeated * count + end)

    return change


def rewrite_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        edit(values)
        rewrite(name, json.dumps(values).encode())(folder)

    return change


def grow(name: str, num_bytes: int) -> Change:
    """Makes a file of num_bytes with a hole, which takes no space on the disk."""

    def change(folder: Path) -> None:
        rewrite(name, b'{"a": "')(folder)
        os.truncate(folder / name, num_bytes)

    return change


def link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def no_real_file(name: str) -> dict[str, Change]:
    """Changes, by title, that put something in the file's place that is too large or not a regular file."""
    return {
        "1 TB": grow(name, 1 << 40),
        "a device": link(name, "/dev/zero"),
        "a link to itself": link(name, name),
        "a link to nothing": link(name, "nowhere"),
    }


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite_header(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        header, data = split((folder / WEIGHTS).read_bytes())
        text = json.dumps(edit(header) or header).encode()
        rewrite(WEIGHTS, struct.pack("<Q", len(text)) + text + data)(folder)

    return change


def raw_header(text: bytes, length: int | None = None) -> Change:
    def change(folder: Path) -> None:
        _, data = split((folder / WEIGHTS).read_bytes())
        rewrite(WEIGHTS, struct.pack("<Q", len(text) if length is None else length) + text + data)(folder)

    return change


def nested(depth: int, opening: str = '{"a":', closing: str = "}") -> bytes:
    return (opening * depth + "1" + closing * depth).encode()
