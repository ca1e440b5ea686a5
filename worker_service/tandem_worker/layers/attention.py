"""Attention over the paged KV cache in plain torch: the reference for the kernels, and what a CPU runs."""

from dataclasses import dataclass

import torch

MAX_GATHERED_TOKENS = 32768
CHEAP_PADDING_TOKENS = 256


@dataclass(frozen=True)
class ChunkMetadata:
    """One row that computes a chunk: its tokens are [start, start + count) of the step's."""

    start: int
    count: int
    context_len: int
    """Tokens of the row up to and including the chunk's last."""
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
    """Where the decoding rows' tokens begin."""
    decode_block_tables: torch.Tensor
    """(decoding rows, most blocks of one) int64, padded with block 0"""
    decode_context_lens: torch.Tensor
    """(decoding rows,) int64"""
    decode_groups: tuple[DecodeGroup, ...]
    """All decoding rows, in their order."""


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
    """Groups for rows of so many blocks, which must descend.

    Padding all rows to the longest would take rows times context: one long context among many short ones, more
    memory than the pool itself. So a group gathers MAX_GATHERED_TOKENS at most, one row aside, and a row that would
    be mostly padding starts the next group, unless that is too little to pay for one.
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
