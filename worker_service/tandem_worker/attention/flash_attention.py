"""Attention by the flash-attn library (Dao 2023), version 2, after our kernel that normalises, rotates and stores.

Its paged KV cache wants blocks of a multiple of 256 tokens. Decoding rows go through flash_attn_with_kvcache, which
splits long contexts. Chunks go through flash_attn_varlen_func, as sequences of one tile of queries each: with a fixed
number of tiles of a fixed size, of which some are empty, a captured graph serves any chunks. It finds a causal mask by
aligning a tile's last query with the last key of its context.
"""

from dataclasses import dataclass

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

from tandem_worker.attention.backend import MixedTokens
from tandem_worker.attention.triton_attention import norm_weights
from tandem_worker.kernels.query_tiles import TILE_QUERIES
from tandem_worker.kernels.store_kv import store_kv
from tandem_worker.layers.norm import RMSNorm


@dataclass(frozen=True)
class _Decodes:
    """One token of each of n decoding rows, and of padding rows, whose contexts are empty."""

    is_row: torch.Tensor
    """(n,) bool: whether the row is not a padding row"""
    context_lens: torch.Tensor
    """(n,) int32"""
    block_tables: torch.Tensor
    """(n, most blocks of a row) int32"""


@dataclass(frozen=True)
class _Chunks:
    """The tiles of chunks' queries in the order of their tokens, then empty ones."""

    query_ends: torch.Tensor
    """(tiles + 1,) int32: where the first tile's queries begin, then where each tile's queries end"""
    context_ends: torch.Tensor
    """(tiles + 1,) int32: 0, then the running sum of the tiles' context lengths"""
    block_tables: torch.Tensor
    """(tiles, most blocks of a row) int32"""


@dataclass(frozen=True)
class _Plan:
    positions: torch.Tensor
    """(tokens,) int32"""
    slots: torch.Tensor
    """(tokens,) int32"""
    decodes: _Decodes | None
    chunks: _Chunks | None


class FlashAttention:
    """See CapturableAttention in backend.py."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def plan_decode(self, rows: torch.Tensor, context_lens: torch.Tensor, block_tables: torch.Tensor) -> _Plan:
        decodes = _plan_decodes(rows, context_lens, block_tables)
        positions = (decodes.context_lens - 1).clamp(min=0)
        blocks = decodes.block_tables.gather(1, (positions // self._block_size).long()[:, None])[:, 0]
        slots = torch.where(decodes.is_row, blocks * self._block_size + positions % self._block_size, 0)
        return _Plan(positions, slots, decodes, None)

    def plan_mixed(self, tokens: MixedTokens) -> _Plan:
        decodes = None
        if tokens.decode_rows is not None:
            # Every decoding row has a token, so padding alone is cut off.
            rows = tokens.decode_rows[: len(tokens.positions)]
            decodes = _plan_decodes(rows, tokens.context_lens, tokens.block_tables)
        return _Plan(tokens.positions, tokens.slots, decodes, _plan_chunks(tokens.tiles, tokens.block_tables))

    def __call__(
        self,
        qkv: torch.Tensor,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        rotary_table: torch.Tensor,
        cache: torch.Tensor,
        metadata: _Plan,
    ) -> torch.Tensor:
        q_weight, k_weight, eps = norm_weights(q_norm, k_norm)
        store_kv(
            qkv, k_weight, eps, rotary_table, metadata.positions, metadata.slots, cache,
            q_norm=q_weight, rotates_queries=True,
        )  # fmt: skip
        q = qkv[:, : qkv.shape[1] - 2 * cache.shape[3]]
        decodes, chunks = metadata.decodes, metadata.chunks
        decoded = None if decodes is None else _attend_decodes(q[: len(decodes.is_row)], cache, decodes)
        if chunks is None:
            assert decoded is not None
            return decoded
        out = _attend_chunks(q, cache, chunks)
        if decodes is not None and decoded is not None:
            first = out[: len(decoded)]
            first.copy_(torch.where(decodes.is_row[:, None], decoded, first))
        return out


def _plan_decodes(rows: torch.Tensor, context_lens: torch.Tensor, block_tables: torch.Tensor) -> _Decodes:
    is_row = rows >= 0
    places = rows.clamp(min=0)
    lens = torch.where(is_row, context_lens.index_select(0, places), 0)
    return _Decodes(is_row, lens, block_tables.index_select(0, places))


def _plan_chunks(tiles: torch.Tensor, block_tables: torch.Tensor) -> _Chunks:
    # Empty tiles go to the end.
    first_tokens = torch.where(tiles[:, 2] > 0, tiles[:, 1], torch.iinfo(torch.int32).max)
    rows, first_tokens, counts, positions = tiles[first_tokens.argsort(), :4].unbind(1)
    query_ends = torch.cat([first_tokens[:1], first_tokens[0] + counts.cumsum(0, dtype=torch.int32)])
    contexts = torch.where(counts > 0, positions + counts, 0)
    context_ends = torch.cat([torch.zeros_like(contexts[:1]), contexts.cumsum(0, dtype=torch.int32)])
    return _Chunks(query_ends, context_ends, block_tables.index_select(0, rows))


def _attend_decodes(q: torch.Tensor, cache: torch.Tensor, decodes: _Decodes) -> torch.Tensor:
    """q (n, heads, head_dim) -> (n, heads * head_dim), of which padding rows' are zeros."""
    out: torch.Tensor = flash_attn_with_kvcache(
        q[:, None], *cache, cache_seqlens=decodes.context_lens, block_table=decodes.block_tables, causal=True
    )
    return out.flatten(1)


def _attend_chunks(q: torch.Tensor, cache: torch.Tensor, chunks: _Chunks) -> torch.Tensor:
    """q (tokens, heads, head_dim) -> (tokens, heads * head_dim), of which only the chunks' tokens mean anything."""
    max_context = chunks.block_tables.shape[1] * cache.shape[2]
    out: torch.Tensor = flash_attn_varlen_func(
        q, *cache, chunks.query_ends, chunks.context_ends, TILE_QUERIES, max_context,
        causal=True, block_table=chunks.block_tables,
    )  # fmt: skip
    return out.flatten(1)
