"""The model families that the worker serves, by the architecture that config.json names.

A new family is a file beside this one and an entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tandem_worker.checkpoint.config_file import ConfigFile, brief
from tandem_worker.checkpoint.model_config import ModelConfig
from tandem_worker.layers.operations import Operations
from tandem_worker.models.model import Model
from tandem_worker.models.qwen3 import Qwen3
from tandem_worker.models.qwen3_config import read_qwen3_config, read_qwen3_moe_config
from tandem_worker.ranks.communicator import Communicator


@dataclass(frozen=True)
class Architecture:
    """How the models of an architecture are read and made."""

    read_config: Callable[[ConfigFile], ModelConfig]
    """Raises ModelError, naming file and key, where the model is not one that Tandem runs"""
    make: Callable[[ModelConfig, Operations, int, torch.dtype, Communicator], Model]
    """Makes a rank's part of a model, uninitialised, on the current device. Takes the whole model's config, the
    operations, the number of positions of the longest context, the weights' type and the rank's communicator.
    """


ARCHITECTURES: dict[str, Architecture] = {
    "Qwen3ForCausalLM": Architecture(read_qwen3_config, Qwen3),
    "Qwen3MoeForCausalLM": Architecture(read_qwen3_moe_config, Qwen3),
}


def read_architecture(folder: Path) -> tuple[Architecture, ModelConfig]:
    """The architecture of a model folder, and its config. Raises ModelError, naming file and key."""
    file = ConfigFile(folder / "config.json")
    names = file.typed("architectures", list)
    for name, architecture in ARCHITECTURES.items():
        if name in names:
            return architecture, architecture.read_config(file)
    raise file.fail("architectures", f"{brief(names)} is not supported; {' and '.join(ARCHITECTURES)} are")


def read_model_config(folder: Path) -> ModelConfig:
    """The config of a model folder. Raises ModelError, naming file and key."""
    _, config = read_architecture(folder)
    return config
