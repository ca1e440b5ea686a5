"""Streams a checkpoint's tensors into a model, one at a time, and takes the model's fingerprint on the way."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from shared.errors import ModelError
from worker_service.model_config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class CheckpointTarget:
    """What a rank holds of a checkpoint's tensor."""

    view: torch.Tensor
    """Where it goes; may be empty"""
    shape: tuple[int, ...]
    """The whole tensor's in the checkpoint"""
    part: tuple[slice, ...]
    """Of the whole, a slice a dimension"""


@dataclass(frozen=True)
class Loaded:
    """What was read: a digest of the contents, and how many bytes they are."""

    digest: str
    num_bytes: int


def load_weights(folder: Path, targets: dict[str, CheckpointTarget], ignored: frozenset[str] = frozenset()) -> Loaded:
    """Fills the targets (by tensor name) from the folder's safetensors, reading no more of these than the targets hold.

    Tensors in `ignored` may be there and are passed over. Raises ModelError, naming file and tensor, for one that is
    missing, unexpected or of the wrong shape.
    """
    missing = dict(targets)
    digests: dict[str, str] = {}
    num_bytes = 0
    for path, name, whole in _stream(folder):
        if name in ignored:
            continue
        if name not in targets:
            raise ModelError(f"{path}: {name}: the model has no such tensor")
        if name not in missing:
            raise ModelError(f"{path}: {name}: is in the checkpoint twice")
        target = missing.pop(name)
        shape = whole.get_shape()
        if tuple(shape) != target.shape:
            raise ModelError(f"{path}: {name}: has shape {shape}, must be {list(target.shape)}")
        if not target.view.numel():
            continue
        tensor = whole[target.part]
        target.view.copy_(tensor)
        contents = tensor.contiguous().view(torch.uint8).numpy()
        num_bytes += contents.nbytes
        digests[name] = f"{tensor.dtype} {shape} {xxhash.xxh3_128_hexdigest(contents.data)}"
    if missing:
        first = min(missing)
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ModelError(f"{_main_file(folder)}: {first}{others}: missing from the checkpoint")
    return Loaded(xxhash.xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode()), num_bytes)


def fingerprint_of(config: ModelConfig, dtype: torch.dtype, digests: list[str]) -> str:
    """Equal for equal config, dtype, tensor shapes and contents, and as many ranks, each of which digests its part."""
    return xxhash.xxh3_128_hexdigest(
        json.dumps([dataclasses.asdict(config), str(dtype), *digests], sort_keys=True).encode()
    )


def _main_file(folder: Path) -> Path:
    index = folder / INDEX_FILE
    return index if index.exists() else folder / SINGLE_FILE


def _stream(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """Every tensor of the checkpoint as safetensors' slice of it, which reads what it is indexed by."""
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    yield path, name, file.get_slice(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: {error}") from error


def _files(folder: Path) -> list[Path]:
    main = _main_file(folder)
    if main.name == SINGLE_FILE:
        return [main]
    try:
        files = sorted({folder / name for name in json.loads(main.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{main}: weight_map: {error!r}") from error
    return files
