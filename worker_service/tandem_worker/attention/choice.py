"""Which attention backend a worker takes, and why not another.

The backend decides what computes the rest of a layer too. With `triton` and `flash-attn` it is our kernels and cuBLAS,
in CUDA graphs; with `torch`, which serves every device, type and shape, it is plain torch.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tandem_shared.config import WorkerSettings
from tandem_shared.errors import ConfigError
from tandem_worker.attention.backend import CapturableAttention
from tandem_worker.checkpoint.model_config import ModelConfig

logger = logging.getLogger(__name__)

TORCH, TRITON, FLASH_ATTN = "torch", "triton", "flash-attn"
HOPPER = (9, 0)
FLASH_BLOCK_MULTIPLE = 256
MODULES = ("triton", "flash_attn")


@dataclass(frozen=True)
class Conditions:
    """What the choice depends on."""

    capability: tuple[int, int] | None
    """The GPU's compute capability; None for a CPU"""
    dtype: torch.dtype
    head_dim: int
    widths: tuple[int, ...]
    """The widths of the rank's linear layers"""
    block_size: int
    installed: frozenset[str]
    """Those of MODULES that can be imported"""


def conditions_of(
    settings: WorkerSettings, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Conditions:
    """config is the rank's own."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    installed = frozenset(module for module in MODULES if importlib.util.find_spec(module) is not None)
    return Conditions(capability, dtype, config.head_dim, widths, settings.block_size, installed)


def why_not_triton(conditions: Conditions) -> str | None:
    """The reason why our kernels can't run; None where they can."""
    if conditions.capability is None:
        return "it needs a GPU"
    if "triton" not in conditions.installed:
        return "triton is not installed"
    if conditions.capability < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if conditions.dtype != torch.bfloat16:
        return f"it computes in bfloat16, not {conditions.dtype}"
    if conditions.head_dim not in (32, 64, 128):
        return f"head_dim {conditions.head_dim} is not 32, 64 or 128"
    if any(width % 64 for width in conditions.widths):
        return "hidden_size, intermediate_size or the heads' size is not a multiple of 64"
    return None


def why_not_flash_attn(conditions: Conditions) -> str | None:
    """The reason why flash-attn can't run, or has not been tried; None where it has. The rest of a layer is ours."""
    if problem := why_not_triton(conditions):
        return problem
    if "flash_attn" not in conditions.installed:
        return "it is not installed: install tandem-llm[flash-attn]"
    if conditions.capability != HOPPER:
        return "it has only been tried on GPUs of compute capability 9.0 (Hopper)"
    if conditions.head_dim not in (64, 128):
        return f"it has only been tried with head_dim 64 and 128, not {conditions.head_dim}"
    if conditions.block_size % FLASH_BLOCK_MULTIPLE:
        return f"it needs --block-size to be a multiple of {FLASH_BLOCK_MULTIPLE}, not {conditions.block_size}"
    return None


REFUSALS: Mapping[str, Callable[[Conditions], str | None]] = {
    TRITON: why_not_triton,
    FLASH_ATTN: why_not_flash_attn,
    TORCH: lambda conditions: None,
}
"""The backends, the fastest first: docs/decisions/0008-attention-backends.md has the numbers"""


def choose(asked: str, conditions: Conditions) -> str:
    """The backend that is asked for, or for `auto` the fastest that can run. Raises ConfigError if that one can't."""
    if asked != "auto":
        if problem := REFUSALS[asked](conditions):
            raise ConfigError(f"--attention-backend {asked}: {problem}")
        return asked
    chosen = next(name for name, why_not in REFUSALS.items() if why_not(conditions) is None)
    if chosen == TORCH and conditions.capability is not None:
        logger.warning("plain torch instead of the fast kernels: %s", why_not_triton(conditions))
    return chosen


def make_attention(
    name: str, settings: WorkerSettings, config: ModelConfig, device: torch.device
) -> CapturableAttention:
    """The backend `triton` or `flash-attn`. config is the rank's own."""
    if name == FLASH_ATTN:
        from tandem_worker.attention.flash_attention import FlashAttention

        return FlashAttention(settings.block_size)
    from tandem_worker.attention.triton_attention import TritonAttention

    return TritonAttention(
        settings.max_num_seqs, config.num_attention_heads, config.num_key_value_heads, config.head_dim, device
    )
