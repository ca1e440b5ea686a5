"""Model folders: which of their files are opened, what JSON files hold, and the tokenizer's digest."""

import json
import os
import socket
from pathlib import Path

import pytest
import xxhash

from tandem_shared.errors import ModelError
from tandem_shared.model_folder import open_regular, read_json, resolve_model, tokenizer_digest


def make_special(path: Path, kind: str) -> Path:
    """Makes something at `path` that is not a regular file, or a symbolic link to such a thing."""
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case "link to a fifo":
            os.mkfifo(path.with_name("fifo"))
            path.symlink_to("fifo")
    return path


SPECIAL = ["fifo", "socket", "device", "directory", "link to a fifo"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.timeout(10)
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = make_special(tmp_path / "tokenizer.json", kind)
    with pytest.raises(ModelError, match=r"tokenizer\.json: is not a regular file"):
        open_regular(path)
    with pytest.raises(ModelError, match=r"tokenizer\.json: is not a regular file"):
        tokenizer_digest(tmp_path)


def test_a_link_to_a_regular_file_is_opened_as_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"{}")
    (tmp_path / "tokenizer.json").symlink_to("blob")
    with open_regular(tmp_path / "tokenizer.json") as file:
        assert file.read() == b"{}"


def test_a_missing_file_and_a_dangling_link_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"x\.json: .*No such file"):
        open_regular(tmp_path / "x.json")
    (tmp_path / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"tokenizer\.json: .*No such file"):
        tokenizer_digest(tmp_path)


def test_the_tokenizers_digest_is_of_its_bytes(tmp_path: Path) -> None:
    assert tokenizer_digest(tmp_path) == ""
    contents = os.urandom((1 << 20) + 7)
    (tmp_path / "tokenizer.json").write_bytes(contents)
    assert tokenizer_digest(tmp_path) == xxhash.xxh3_128_hexdigest(contents)
    assert len(tokenizer_digest(resolve_model("embedded", []))) == 32


@pytest.mark.parametrize("name", ["", "a" * 5000, "a\0b", "./nothing", "a/b/c"])
def test_what_names_no_folder_is_a_model_error(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(name, [])
    assert len(str(caught.value)) < 500


def test_a_json_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert read_json(path, is_optional=True) == {}
    with pytest.raises(ModelError, match=r"config\.json"):
        read_json(path)
    path.write_text(json.dumps({"model_type": "qwen3"}))
    assert read_json(path) == read_json(path, is_optional=True) == {"model_type": "qwen3"}
    for text in ("[]", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            read_json(path, is_optional=True)
