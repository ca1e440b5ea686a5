"""Streams a checkpoint's tensors into a model, one at a time, and takes the model's fingerprint on the way."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from shared.errors import ModelError
from worker_service.model_config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def load_weights(folder: Path, targets: dict[str, torch.Tensor], ignored: frozenset[str] = frozenset()) -> str:
    """Fills the targets (tensor name -> destination) from the folder's safetensors; gives a digest of the contents.

    Tensors in `ignored` may be there and are passed over. Raises ModelError, naming file and tensor, for one that is
    missing, unexpected or of the wrong shape.
    """
    missing = dict(targets)
    digests: dict[str, str] = {}
    for path, name, tensor in _stream(folder):
        if name in ignored:
            continue
        if name not in targets:
            raise ModelError(f"{path}: {name}: the model has no such tensor")
        if name not in missing:
            raise ModelError(f"{path}: {name}: is in the checkpoint twice")
        target = missing.pop(name)
        if tensor.shape != target.shape:
            raise ModelError(f"{path}: {name}: has shape {list(tensor.shape)}, must be {list(target.shape)}")
        target.copy_(tensor)
        contents = tensor.contiguous().view(torch.uint8).numpy()
        digests[name] = f"{tensor.dtype} {list(tensor.shape)} {xxhash.xxh3_128_hexdigest(contents.data)}"
    if missing:
        first = min(missing)
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ModelError(f"{_main_file(folder)}: {first}{others}: missing from the checkpoint")
    return xxhash.xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode())


def fingerprint_of(config: ModelConfig, dtype: torch.dtype, contents: str) -> str:
    """Equal for equal config, dtype, tensor shapes and contents."""
    return xxhash.xxh3_128_hexdigest(
        json.dumps([dataclasses.asdict(config), str(dtype), contents], sort_keys=True).encode()
    )


def _main_file(folder: Path) -> Path:
    index = folder / INDEX_FILE
    return index if index.exists() else folder / SINGLE_FILE


def _stream(folder: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Every tensor of the checkpoint, mapped from its file and not copied."""
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    yield path, name, file.get_tensor(name)
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
