"""Attention over the paged KV cache in plain torch: the reference for the kernels, and what a CPU runs."""

from dataclasses import dataclass

import torch

from tandem_worker.layers.norm import RMSNorm
from tandem_worker.layers.rotary import apply_rotary

MAX_GATHERED_TOKENS = 32768
"""Tokens whose KV is gathered at a time, padding included"""
CHEAP_PADDING_TOKENS = 256
"""Padding that costs less than another group of rows"""


@dataclass(frozen=True)
class ChunkMetadata:
    """A row that computes a chunk of its prompt: the tokens [start, start + count) of the step."""

    start: int
    count: int
    context_len: int
    """Tokens of the row up to the chunk's last one, and with it"""
    block_table: torch.Tensor
    """(blocks of context_len,) int64"""


@dataclass(frozen=True)
class DecodeGroup:
    """Decoding rows next to each other that are computed together, each padded to num_blocks."""

    num_rows: int
    num_blocks: int


@dataclass(frozen=True)
class AttentionMetadata:
    """What attention needs to know of a step. Tokens of chunks come first, then one token of each decoding row."""

    positions: torch.Tensor
    """(tokens,) int64"""
    slot_mapping: torch.Tensor
    """(tokens,) int64: where each token's KV goes; slots of block 0 are never read."""
    chunks: tuple[ChunkMetadata, ...]
    decode_start: int
    """The index of the first decoding row's token"""
    decode_block_tables: torch.Tensor
    """(decoding rows, most blocks of a row) int64, padded with block 0"""
    decode_context_lens: torch.Tensor
    """(decoding rows,) int64"""
    decode_groups: tuple[DecodeGroup, ...]
    """All decoding rows, in their order."""


class TorchAttention:
    """The Attention interface in plain torch, on any device and in any floating type."""

    def __call__(
        self,
        qkv: torch.Tensor,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        rotary_table: torch.Tensor,
        cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        num_kv_heads = cache.shape[3]
        q, k, v = qkv.split([qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        q = q if q_norm is None else q_norm(q)
        k = k if k_norm is None else k_norm(k)
        rotary = rotary_table[metadata.positions]
        return torch_attention(apply_rotary(q, rotary), apply_rotary(k, rotary), v, cache, metadata).flatten(1)


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata
) -> torch.Tensor:
    """Attention in plain torch: chunks row by row, decoding rows in groups over gathered, padded contexts.

    q (tokens, heads, head_dim), k and v (tokens, KV heads, head_dim), cache (2, blocks, block_size, KV heads, head_dim)
    -> (tokens, heads, head_dim). Stores all of the step's k and v before it reads any.
    """
    key_cache, value_cache = cache
    key_cache.flatten(0, 1)[metadata.slot_mapping] = k
    value_cache.flatten(0, 1)[metadata.slot_mapping] = v
    out = torch.empty_like(q)
    for chunk in metadata.chunks:
        tokens = slice(chunk.start, chunk.start + chunk.count)
        keys = key_cache[chunk.block_table].flatten(0, 1)[: chunk.context_len]
        values = value_cache[chunk.block_table].flatten(0, 1)[: chunk.context_len]
        out[tokens] = _attend_chunk(q[tokens], keys, values)
    first = 0
    for group in metadata.decode_groups:
        rows = slice(first, first + group.num_rows)
        tokens = slice(metadata.decode_start + rows.start, metadata.decode_start + rows.stop)
        tables = metadata.decode_block_tables[rows, : group.num_blocks]
        keys = key_cache[tables].flatten(1, 2)
        values = value_cache[tables].flatten(1, 2)
        out[tokens] = _attend_one(q[tokens], keys, values, metadata.decode_context_lens[rows])
        first = rows.stop
    return out


def group_decodes(num_blocks: list[int], block_size: int) -> tuple[DecodeGroup, ...]:
    """Groups of decoding rows that have num_blocks blocks each, in descending order.

    If all rows were padded to the longest, one long context among many short ones would take more memory than the pool
    itself. So a group gathers MAX_GATHERED_TOKENS at most, unless it is a single row, and a row that would be mostly
    padding starts the next group, unless the padding is less than CHEAP_PADDING_TOKENS.
    """
    groups: list[DecodeGroup] = []
    first = 0
    for i in range(1, len(num_blocks) + 1):
        if i < len(num_blocks):
            most = num_blocks[first]
            padding = (most - num_blocks[i]) * block_size
            is_wasteful = padding > max(num_blocks[i] * block_size, CHEAP_PADDING_TOKENS)
            if not is_wasteful and (i - first + 1) * most * block_size <= MAX_GATHERED_TOKENS:
                continue
        groups.append(DecodeGroup(i - first, num_blocks[first]))
        first = i
    return tuple(groups)


def _attend_chunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The last len(q) of len(k) positions attend causally. q (n, heads, d), k and v (context, KV heads, d)."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries == num_keys:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1)


def _attend_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context_lens: torch.Tensor) -> torch.Tensor:
    """One query a row. q (rows, heads, d), k and v (rows, padded context, KV heads, d).

    What lies past a row's context may be anything, NaN too, so it is replaced and not only weighted with zero.
    """
    rows, heads, dim = q.shape
    is_context = torch.arange(k.shape[1], device=q.device) < context_lens[:, None]
    v = v.masked_fill(~is_context[:, :, None, None], 0)
    grouped = q.view(rows, k.shape[2], heads // k.shape[2], dim)
    scores = grouped @ k.permute(0, 2, 3, 1) * dim**-0.5
    scores = scores if scores.dtype == torch.float64 else scores.float()
    weights = scores.masked_fill(~is_context[:, None, None], -torch.inf).softmax(-1).to(v.dtype)
    return (weights @ v.transpose(1, 2)).view(rows, heads, dim)
