"""Streams a checkpoint's tensors into a model, one at a time, and takes the model's fingerprint on the way."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from tandem_shared.errors import ModelError
from tandem_shared.model_folder import check_regular, exists
from tandem_shared.rust_panic import is_rust_panic
from tandem_worker.checkpoint.config_file import ConfigFile, brief
from tandem_worker.checkpoint.model_config import ModelConfig
from tandem_worker.checkpoint.targets import CheckpointTarget

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_NAME_CHARACTERS = 255
"""The longest file name of a shard; no file system has longer names."""
FLOATS = ("F64", "F32", "F16", "BF16")
QUANTISED = re.compile(
    r".*\.(qweight|qzeros|scales|g_idx|SCB|weight_shape|\w+_(scale(_inv|_2)?|zero_point|packed)|(nested_)?(absmax|quant_map)"
    r"|quant_state\..*)"
)
"""The names of tensors that quantised checkpoints have beside, or in place of, weights."""
NOT_YET = "quantised models are not supported yet"
FUSED_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
"""The name of a tensor that holds the weights of all experts, as transformers 5 may save them."""
FUSED_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The last part of such a name -> the weights that the tensor holds of each expert, one above the other."""


@dataclass(frozen=True)
class Loaded:
    """What was read of a checkpoint: a digest of the contents, and the number of their bytes."""

    digest: str
    num_bytes: int


@dataclass(frozen=True)
class _ExpertWeight:
    """One expert's weight in a tensor of all experts. It can be used like safetensors' slice of a whole tensor."""

    whole: Any
    expert: int
    first_row: int
    num_rows: int

    def get_dtype(self) -> str:
        return str(self.whole.get_dtype())

    def get_shape(self) -> list[int]:
        return [self.num_rows, *self.whole.get_shape()[2:]]

    def __getitem__(self, part: tuple[slice, slice]) -> torch.Tensor:
        first, stop, _ = part[0].indices(self.num_rows)
        rows = slice(self.first_row + first, self.first_row + stop)
        tensor: torch.Tensor = self.whole[self.expert, rows, part[1]]
        return tensor


def load_weights(
    folder: Path,
    targets: dict[str, CheckpointTarget],
    tied: Mapping[str, str] | None = None,
    on_loaded: Callable[[], None] = lambda: None,
) -> Loaded:
    """Fills the targets, by the checkpoint's names, from the folder's safetensors, of which it reads only what the
    targets hold.

    tied: tensors that may be there and are not used -> the targets that they should equal; a warning says where one
    does not. on_loaded is called after each target. Raises ModelError, naming file and tensor, where a tensor is
    missing, unexpected, quantised or of a wrong shape.
    """
    tied = tied or {}
    missing = dict(targets)
    digests: dict[str, str] = {}
    digests_of_tied: dict[str, str] = {}
    num_bytes = 0
    for path, name, whole in _stream(folder):
        target = targets.get(tied.get(name, name))
        if target is None:
            problem = NOT_YET if QUANTISED.fullmatch(name) else "the model has no such tensor"
            raise ModelError(f"{path}: {name}: {problem}")
        if name not in tied and missing.pop(name, None) is None:
            raise ModelError(f"{path}: {name}: is in the checkpoint twice")
        if whole.get_dtype() not in FLOATS:
            raise ModelError(f"{path}: {name}: is of type {whole.get_dtype()}; {NOT_YET}")
        shape = whole.get_shape()
        if name in tied and tuple(shape) != target.shape:
            digests_of_tied[name] = f"of shape {shape}"
            continue
        if tuple(shape) != target.shape:
            raise ModelError(f"{path}: {name}: has shape {shape}, must be {list(target.shape)}")
        if not target.view.numel():
            continue
        tensor = whole[target.part]
        contents = tensor.contiguous().view(torch.uint8).numpy()
        digest = f"{tensor.dtype} {shape} {xxhash.xxh3_128_hexdigest(contents.data)}"
        if name in tied:
            digests_of_tied[name] = digest
            continue
        target.view.copy_(tensor)
        num_bytes += contents.nbytes
        digests[name] = digest
        on_loaded()
    if missing:
        first = min(missing)
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ModelError(f"{_main_file(folder) or folder}: {first}{others}: missing from the checkpoint")
    for name, digest in digests_of_tied.items():
        if digest != digests.get(tied[name]):
            logger.warning(
                "%s: %s differs from %s, which is used in its place (config.json: tie_word_embeddings)",
                folder, name, tied[name],
            )  # fmt: skip
    return Loaded(xxhash.xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode()), num_bytes)


def fingerprint_of(config: ModelConfig, dtype: torch.dtype, digests: list[str]) -> str:
    """The model's fingerprint: equal for equal config, dtype, tensor shapes and contents, and number of ranks.

    digests: those of all ranks, each of its own part of the tensors.
    """
    return xxhash.xxh3_128_hexdigest(
        json.dumps([dataclasses.asdict(config), str(dtype), *digests], sort_keys=True).encode()
    )


def _main_file(folder: Path) -> Path | None:
    """The checkpoint's index or its single file. None where there is neither."""
    return next((folder / name for name in (INDEX_FILE, SINGLE_FILE) if exists(folder / name)), None)


def _stream(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """Every tensor of the checkpoint: file, name, and safetensors' slice, which reads only what it is indexed by. Fused
    experts come as each expert's own weights.
    """
    for path in _files(folder):
        check_regular(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (the file is not a dict)
                    for part_name, part in _split_experts(name, file.get_slice(name)):
                        yield path, part_name, part
        except (OSError, MemoryError, SafetensorError) as error:
            raise ModelError(f"{path}: {error}") from error
        except BaseException as error:
            if not is_rust_panic(error):
                raise
            raise ModelError(f"{path}: {error}") from error


def _split_experts(name: str, whole: Any) -> Iterator[tuple[str, Any]]:
    fused = FUSED_EXPERTS.fullmatch(name)
    shape = whole.get_shape()
    parts = FUSED_PARTS[fused[2]] if fused else ()
    if fused is None or len(shape) != 3 or shape[1] % len(parts):
        yield name, whole
        return
    num_rows = shape[1] // len(parts)
    for expert in range(shape[0]):
        for index, part in enumerate(parts):
            yield f"{fused[1]}.{expert}.{part}.weight", _ExpertWeight(whole, expert, index * num_rows, num_rows)


def _files(folder: Path) -> list[Path]:
    """The checkpoint's files, in the order in which they are read."""
    main = _main_file(folder)
    if main is None:
        # These are shards whose index was lost. Hidden files are not part of the model.
        files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
        if not files:
            raise ModelError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE} nor other *.safetensors files")
        return files
    if main.name == SINGLE_FILE:
        return [main]
    index = ConfigFile(main)
    names = index.typed("weight_map", dict).values()
    for name in names:
        # The model is in this folder alone: a name that leads out of it is refused.
        is_name = isinstance(name, str) and Path(name).name == name and name not in ("", "..")
        if not is_name or len(name) > MAX_NAME_CHARACTERS:
            raise index.fail("weight_map", f"{brief(name)} is not the name of a file in the folder")
    if not names:
        raise index.fail("weight_map", "is missing or empty")
    return [folder / name for name in sorted(set(names))]
