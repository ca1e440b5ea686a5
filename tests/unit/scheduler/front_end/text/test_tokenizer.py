"""Loading a tokenizer: what training left in the file is switched off, and a broken file is a ModelError."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tandem_scheduler.front_end.text.tokenizer import load_tokenizer
from tandem_shared.errors import ModelError
from tandem_shared.model_folder import resolve_model, tokenizer_digest
from tests.unit.shared.test_model_folder import SPECIAL, make_special

EMBEDDED = resolve_model("embedded", []) / "tokenizer.json"
TEXT = "To be, or not to be, that is the question. " * 3


def write_tokenizer(folder: Path, **changes: Any) -> Path:
    """The embedded model's tokenizer.json with other values."""
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(EMBEDDED.read_text()) | changes))
    return folder


def padding(length: int) -> dict[str, Any]:
    return {
        "strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip


def truncation(length: int, stride: int = 0) -> dict[str, Any]:
    return {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": stride}


@pytest.mark.parametrize(
    "changes",
    [
        {"truncation": truncation(8)},
        {"padding": padding(200)},
        {"truncation": truncation(8), "padding": padding(12)},
        # Each of these two ended the process, or the call, when the first text came.
        {"padding": padding(10**8)},
        {"truncation": truncation(8, stride=9)},
    ],
)
def test_saved_truncation_and_padding_are_switched_off(changes: dict[str, Any], tmp_path: Path) -> None:
    expected = Tokenizer.from_file(str(EMBEDDED)).encode(TEXT).ids
    assert len(expected) > 32
    assert load_tokenizer(write_tokenizer(tmp_path, **changes)).encode(TEXT).ids == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}},
        # The library panics, which is not an Exception.
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ],
)
def test_a_broken_tokenizer_is_refused_by_its_file(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: "):
        load_tokenizer(write_tokenizer(tmp_path, **changes))


def test_a_huge_tokenizer_is_refused_before_it_is_read_to_its_end(tmp_path: Path) -> None:
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)
    for read in (load_tokenizer, tokenizer_digest):
        with pytest.raises(ModelError, match=r"tokenizer\.json: is larger than 64 MiB"):
            read(tmp_path)


def test_no_tokenizer_is_refused_by_its_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: .*No such file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.timeout(10)
def test_only_a_regular_file_is_opened(kind: str, tmp_path: Path) -> None:
    make_special(tmp_path / "tokenizer.json", kind)
    with pytest.raises(ModelError, match=r"tokenizer\.json: is not a regular file"):
        load_tokenizer(tmp_path)
