"""Where a model's tensors go: what a rank holds of each tensor of a checkpoint, by the checkpoint's names."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from tandem_worker.ranks.shard import ShardedDimension


@dataclass(frozen=True)
class CheckpointTarget:
    """What a rank holds of a checkpoint's tensor."""

    view: torch.Tensor
    """The memory that the rank's part is written to; it may be empty"""
    shape: tuple[int, ...]
    """The whole tensor's shape in the checkpoint"""
    part: tuple[slice, ...]
    """The rank's part of the whole tensor: one slice for each dimension"""


@runtime_checkable
class ShardedLayer(Protocol):
    """A layer that holds a part of some tensors, or several tensors packed into one."""

    def targets(self, path: str) -> dict[str, CheckpointTarget]:
        """The layer's tensors by their names in the checkpoint. path is the layer's own name in the model."""


def whole(view: torch.Tensor) -> CheckpointTarget:
    """The target of a tensor that every rank holds whole."""
    return CheckpointTarget(view, tuple(view.shape), (slice(None),) * view.dim())


def some_rows(view: torch.Tensor, rows: ShardedDimension) -> CheckpointTarget:
    """The target of a matrix (outputs, inputs) whose outputs the ranks divide; view (this rank's outputs, inputs)."""
    return CheckpointTarget(view, (rows.length, view.shape[1]), (rows.part, slice(None)))


def some_columns(view: torch.Tensor, columns: ShardedDimension) -> CheckpointTarget:
    """The target of a matrix (outputs, inputs) whose inputs the ranks divide; view (outputs, this rank's inputs)."""
    return CheckpointTarget(view, (view.shape[0], columns.length), (slice(None), columns.part))


def causal_lm_targets(model: nn.Module) -> dict[str, CheckpointTarget]:
    """The tensors of all layers in a model, whose modules are named as in transformers' class for the architecture. In
    that one all but lm_head stand within a module "model".
    """
    targets: dict[str, CheckpointTarget] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, ShardedLayer):
            targets |= layer.targets(path)
        else:
            for name, parameter in layer.named_parameters(path, recurse=False):
                targets[name] = whole(parameter)
    return {name if name == "lm_head.weight" else f"model.{name}": target for name, target in targets.items()}
