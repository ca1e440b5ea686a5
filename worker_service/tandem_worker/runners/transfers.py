"""Copies between host and device that neither side waits for, through pinned memory that torch keeps until the stream
has come past the copy.
"""

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(values)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def copy_to(target: torch.Tensor, values: np.ndarray) -> None:
    """Writes values to target, of the same length and type, on a GPU."""
    target.copy_(torch.from_numpy(values).pin_memory(), non_blocking=True)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy that is complete when the stream has come to it."""
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
