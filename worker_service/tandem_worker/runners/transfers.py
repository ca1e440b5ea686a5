"""Copies between host and device for which neither side waits. They go through pinned memory, which torch keeps until
the stream has passed the copy.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tandem_shared.step_plan import Int32Array


def padded(lines: Sequence[Sequence[int] | Int32Array], width: int) -> Int32Array:
    """Lines of up to `width` numbers as one array (lines, width) for one copy. Zeros follow a shorter line."""
    array = np.zeros((len(lines), width), np.int32)
    for target, line in zip(array, lines, strict=True):
        target[: len(line)] = line
    return array


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(values)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def copy_to(target: torch.Tensor, values: np.ndarray) -> None:
    """Writes values to target, a tensor of the same shape and type."""
    host = torch.from_numpy(values)
    target.copy_(host if target.device.type == "cpu" else host.pin_memory(), non_blocking=True)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy on the host, which is complete once the stream has passed this point."""
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
