"""What a test needs of the machine beyond a GPU."""

import importlib.util

import pytest
import torch

HOPPER = (9, 0)
needs_flash_attn = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None
    or not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != HOPPER,
    reason="needs flash-attn and a Hopper GPU",
)
