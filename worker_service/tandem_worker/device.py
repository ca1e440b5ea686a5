"""The device and the type that a worker computes with, as its settings choose them."""

import torch

from tandem_shared.config import WorkerSettings
from tandem_shared.errors import ConfigError


def device_of(settings: WorkerSettings) -> torch.device:
    """Raises ConfigError where the settings ask for a GPU and there is none."""
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise ConfigError("--device cuda: torch finds no GPU")
    return torch.device("cuda" if has_gpu and settings.device != "cpu" else "cpu")


def dtype_of(settings: WorkerSettings) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if device_of(settings).type == "cuda" else torch.float32
    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
