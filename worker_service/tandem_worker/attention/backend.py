"""The interface of attention backends. A model calls an Attention; the fast runner captures a CapturableAttention."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tandem_worker.layers.norm import RMSNorm


class Attention(Protocol):
    """One layer's attention: QK-norms where the model has any, rotary embedding, KV store and attention."""

    def __call__(
        self,
        qkv: torch.Tensor,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        rotary_table: torch.Tensor,
        cache: torch.Tensor,
        metadata: Any,
    ) -> torch.Tensor:
        """Returns (tokens, heads * head_dim).

        qkv (tokens, heads + 2 KV heads, head_dim), may be overwritten. q_norm and k_norm over head_dim, or both None.
        rotary_table (positions, 2, head_dim // 2). cache (2, blocks, block_size, KV heads, head_dim). metadata is the
        backend's own, and the same for all layers. All k and v that are given are stored before any are read.
        """


@dataclass(frozen=True)
class MixedTokens:
    """The tokens of a mixed step, or of one of its micro-batches, on the device: one token of each decoding row comes
    first, then the tokens of chunks.
    """

    positions: torch.Tensor
    """(tokens,) int32"""
    slots: torch.Tensor
    """(tokens,) int32: where each token's KV is stored; slots of block 0 are never read"""
    block_tables: torch.Tensor
    """(all rows, most blocks of a row) int32"""
    context_lens: torch.Tensor
    """(all rows,) int32: each row's tokens with KV, those of this step included"""
    tiles: torch.Tensor
    """(tiles, TILE_FIELDS) int32: the chunks' queries, see query_tiles.cut_tiles; padding tiles among them"""
    decode_rows: torch.Tensor | None
    """(n,) int32: the decoding rows, then padding rows, which are negative and may be more than there are tokens; None
    where no row decodes
    """


class CapturableAttention(Attention, Protocol):
    """Attention whose metadata is made on the device, from tensors at fixed places, so that CUDA graphs can hold it.

    It owns its scratch memory, so it runs on one stream. Other kernels must run between a plan and the first attention
    that uses it, as those of a layer before its attention do: see kernels/gdc.py.
    """

    def plan_decode(self, rows: torch.Tensor, context_lens: torch.Tensor, block_tables: torch.Tensor) -> Any:
        """The metadata of a step whose every token is a decoding row's.

        rows (n,) int32, of which negative ones are padding; at least one. context_lens (all rows,) int32 include the
        tokens of this step. block_tables (all rows, most blocks of a row) int32.
        """

    def plan_mixed(self, tokens: MixedTokens) -> Any:
        """The metadata of a mixed step, or of one of its micro-batches."""
