"""Causal attention for chunks of prompts: flash attention (Dao 2023) over paged KV.

The context before a chunk is read through the row's block table; the chunk's own keys and values are read from the
step's activations, where they lie side by side. q is normalised and rotated here; k has been by store_kv. The work is
cut into tiles of queries (query_tiles.py), so that there is no padding but in a chunk's last tile.
"""

import torch
import triton
import triton.language as tl

from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel, supports_pdl
from tandem_worker.kernels.query_tiles import TILE_QUERIES
from tandem_worker.kernels.store_kv import load_norm, normalize_and_rotate

KEYS = 128
"""Keys that a program takes in at a time."""
LOG2_E = 1.4426950408889634


@triton.jit
def _attend_tile(q1, q2, k1, k2, v, visible, acc, best, total, scale, MASKED: tl.constexpr):
    """Adds a tile of keys, as halves of (D // 2, KEYS), and values, (KEYS, D), to the running softmax. If MASKED, each
    query sees the keys that `visible`, (QUERIES, KEYS), says; else all.
    """
    scores = tl.dot(q2, k2, tl.dot(q1, k1))
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - new_best[:, None])
    correction = tl.exp2(best - new_best)
    total = total * correction + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * correction[:, None])
    return acc, new_best, total


@triton.jit
def _attend_before(
    q1, q2, acc, best, total, end, table, key_cache, value_cache, kv_head, scale,
    KVH: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Adds the positions [0, end), which all queries see, through the block table."""
    HALF: tl.constexpr = D // 2
    # The loop is bound by address arithmetic, so more stages would only cost registers.
    for start in tl.range(0, end, KEYS, num_stages=2):
        tokens = start + tl.arange(0, KEYS)
        in_context = tokens < end
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=in_context, other=0).to(tl.int64)
        where = ((blocks * BLOCK_SIZE + tokens % BLOCK_SIZE) * KVH + kv_head) * D
        keys = key_cache + where[None, :] + tl.arange(0, HALF)[:, None]
        k1 = tl.load(keys, mask=in_context[None, :], other=0.0)
        k2 = tl.load(keys + HALF, mask=in_context[None, :], other=0.0)
        v = tl.load(value_cache + where[:, None] + tl.arange(0, D)[None, :], mask=in_context[:, None], other=0.0)
        acc, best, total = _attend_tile(q1, q2, k1, k2, v, in_context[None, :], acc, best, total, scale, True)
    return acc, best, total


@triton.jit
def _attend_own(
    q1, q2, acc, best, total, first, end, last_key, keys, values, stride, scale,
    D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the chunk's own tokens [first, end). If MASKED, each query sees those up to its last_key, (QUERIES,)."""
    HALF: tl.constexpr = D // 2
    for start in range(first, end, KEYS):
        tokens = start + tl.arange(0, KEYS)
        where = tokens.to(tl.int64) * stride
        k_places = keys + where[None, :] + tl.arange(0, HALF)[:, None]
        v_places = values + where[:, None] + tl.arange(0, D)[None, :]
        if MASKED:
            in_chunk = tokens < end
            k1 = tl.load(k_places, mask=in_chunk[None, :], other=0.0)
            k2 = tl.load(k_places + HALF, mask=in_chunk[None, :], other=0.0)
            v = tl.load(v_places, mask=in_chunk[:, None], other=0.0)
        else:
            k1 = tl.load(k_places)
            k2 = tl.load(k_places + HALF)
            v = tl.load(v_places)
        visible = tokens[None, :] <= last_key[:, None]
        acc, best, total = _attend_tile(q1, q2, k1, k2, v, visible, acc, best, total, scale, MASKED)
    return acc, best, total


@triton.jit
def _prefill_attention(
    qkv, q_norm, rotary, key_cache, value_cache, block_tables, tiles, out, table_stride, eps, scale,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(1) * 5
    head = tl.program_id(0)
    kv_head = head // (H // KVH)
    row = tl.load(tile).to(tl.int64)
    first_token = tl.load(tile + 1)
    num_queries = tl.load(tile + 2)
    position = tl.load(tile + 3)
    num_before = tl.load(tile + 4)
    HALF: tl.constexpr = D // 2
    STRIDE: tl.constexpr = (H + 2 * KVH) * D
    queries = tl.arange(0, QUERIES)
    columns = tl.arange(0, D)
    half = tl.arange(0, HALF)[None, :]
    mask = queries[:, None] < num_queries
    angles = rotary + (position + queries)[:, None] * D + half
    cos = tl.load(angles, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(angles + HALF, mask=mask, other=0.0).to(tl.float32)
    norm1, norm2 = load_norm(q_norm, D, NORM)
    wait_for_predecessor(PDL)
    tokens = (first_token + queries).to(tl.int64)[:, None]
    heads = qkv + tokens * STRIDE + head * D + half
    q1 = tl.load(heads, mask=mask, other=0.0).to(tl.float32)
    q2 = tl.load(heads + HALF, mask=mask, other=0.0).to(tl.float32)
    q1, q2 = normalize_and_rotate(q1, q2, norm1, norm2, cos, sin, eps, D, NORM, qkv.dtype.element_ty)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    acc, best, total = _attend_before(
        q1, q2, acc, best, total, num_before, block_tables + row * table_stride, key_cache, value_cache, kv_head, scale,
        KVH, D, BLOCK_SIZE, KEYS,
    )  # fmt: skip
    # All queries see the chunk's keys before the tile's first token, and each sees the tile's own keys up to itself.
    offset = position - num_before
    num_whole = (offset + 1) // KEYS * KEYS
    last_key = offset + tl.minimum(queries, num_queries - 1)
    keys = qkv + (first_token - offset).to(tl.int64) * STRIDE + (H + kv_head) * D
    values = keys + KVH * D
    acc, best, total = _attend_own(
        q1, q2, acc, best, total, 0, num_whole, last_key, keys, values, STRIDE, scale, D, KEYS, False
    )
    acc, best, total = _attend_own(
        q1, q2, acc, best, total, num_whole, offset + num_queries, last_key, keys, values, STRIDE, scale, D, KEYS, True
    )
    out_places = out + (tokens * H + head) * D + columns[None, :]
    tl.store(out_places, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


_kernel = Kernel(_prefill_attention)


def prefill_attention(
    qkv: torch.Tensor, q_norm: torch.Tensor | None, eps: float, rotary: torch.Tensor, cache: torch.Tensor,
    block_tables: torch.Tensor, tiles: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    """Writes the tiles' tokens of out, (tokens, heads * head_dim).

    qkv (tokens, heads + 2 KV heads, head_dim), its k normalised and rotated; q_norm (head_dim,) or None;
    rotary (positions, 2, head_dim // 2); tiles (tiles, TILE_FIELDS) int32 as query_tiles.cut_tiles gives them, padding
    tiles among them.
    """
    _, num_all, head_dim = qkv.shape
    num_kv_heads = cache.shape[3]
    num_heads = num_all - 2 * num_kv_heads
    _kernel(
        # A pointer that is not used must still be one.
        (num_heads, len(tiles), 1), qkv, qkv if q_norm is None else q_norm, rotary, cache[0], cache[1], block_tables,
        tiles, out, block_tables.stride(0), eps, head_dim**-0.5 * LOG2_E,
        H=num_heads, KVH=num_kv_heads, D=head_dim, BLOCK_SIZE=cache.shape[2], QUERIES=TILE_QUERIES, KEYS=KEYS,
        NORM=q_norm is not None, PDL=supports_pdl(qkv.device), num_warps=8, num_stages=3,
    )  # fmt: skip
