"""The KV pool: how many blocks there is memory for, and the tensor that holds them."""

import logging
from dataclasses import dataclass

import torch

from tandem_shared.errors import ModelError
from tandem_worker.checkpoint.model_config import ModelConfig

logger = logging.getLogger(__name__)

MIN_BLOCKS = 2
"""The padding block and one that a sequence can have."""


@dataclass(frozen=True)
class KVCacheShape:
    """One block of one layer is (2, block_size, KV heads, head_dim)."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        elements = 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim
        return elements * self.dtype.itemsize


def shape_of(config: ModelConfig, block_size: int, dtype: torch.dtype) -> KVCacheShape:
    return KVCacheShape(config.num_hidden_layers, block_size, config.num_key_value_heads, config.head_dim, dtype)


def num_blocks_within(num_bytes: int, shape: KVCacheShape) -> int:
    """Blocks that fit; ModelError if they hold no sequence at all."""
    num_blocks = num_bytes // shape.bytes_per_block
    if num_blocks < MIN_BLOCKS:
        raise ModelError(
            f"too little memory: {max(num_bytes, 0) / 2**20:.1f} MiB are left for the KV pool, "
            f"and {MIN_BLOCKS} blocks of {shape.block_size} tokens take "
            f"{MIN_BLOCKS * shape.bytes_per_block / 2**20:.1f} MiB"
        )
    return num_blocks


def allocate(num_blocks: int, shape: KVCacheShape, device: torch.device) -> torch.Tensor:
    """(layers, 2, blocks, block_size, KV heads, head_dim) zeros."""
    size = (shape.num_layers, 2, num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
    try:
        return torch.zeros(size, dtype=shape.dtype, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise ModelError(f"too little memory for {num_blocks} KV blocks: {error}") from error


def cut_context(wanted: int, num_blocks: int, block_size: int) -> int:
    """The longest context that the pool holds, at most the wanted one; says so where it cuts."""
    held = (num_blocks - 1) * block_size
    if held < wanted:
        logger.warning(
            "the context is cut from %d to %d tokens: that is what the KV pool's %d blocks hold",
            wanted, held, num_blocks - 1,
        )  # fmt: skip
    return min(wanted, held)
