"""QK-norm and rotary embedding in place, of keys and if wanted of queries, with the KV store. One program a token."""

import torch
import triton
import triton.language as tl

from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel, supports_pdl


@triton.jit
def load_norm(norm, D: tl.constexpr, NORM: tl.constexpr):
    """The halves of a norm's weights as float32, (1, D // 2) each; ones, which nothing uses, if there is no norm."""
    HALF: tl.constexpr = D // 2
    half = tl.arange(0, HALF)[None, :]
    if NORM:
        return tl.load(norm + half).to(tl.float32), tl.load(norm + HALF + half).to(tl.float32)
    return tl.full([1, HALF], 1.0, tl.float32), tl.full([1, HALF], 1.0, tl.float32)


@triton.jit
def normalize_and_rotate(
    first, second, norm_first, norm_second, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr, dtype: tl.constexpr
):
    """RMSNorm over the head's dimension if NORM, then rotation. first and second are the halves of heads, (n, D // 2)
    float32; norms, cos and sin (n or 1, D // 2). Rounded to dtype where plain torch rounds.
    """
    if NORM:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        inverse = tl.rsqrt(square / D + eps)[:, None]
        first = (first * inverse * norm_first).to(dtype).to(tl.float32)
        second = (second * inverse * norm_second).to(dtype).to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _rotate_heads(
    heads, num_heads, norm_first, norm_second, cos, sin, eps,
    D: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Normalises and rotates num_heads heads, PAD at most, in place; gives their halves, (PAD, D // 2)."""
    HALF: tl.constexpr = D // 2
    number = tl.arange(0, PAD)[:, None]
    mask = number < num_heads
    places = heads + number * D + tl.arange(0, HALF)[None, :]
    first = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=mask, other=0.0).to(tl.float32)
    first, second = normalize_and_rotate(first, second, norm_first, norm_second, cos, sin, eps, D, NORM, dtype)
    tl.store(places, first, mask=mask)
    tl.store(places + HALF, second, mask=mask)
    return first, second


@triton.jit
def _store_kv(
    qkv, q_norm, k_norm, rotary, positions, slots, key_cache, value_cache, eps,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, H_PAD: tl.constexpr, KVH_PAD: tl.constexpr,
    NORM: tl.constexpr, QUERIES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """If QUERIES, queries are normalised and rotated too."""
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = D // 2
    dtype: tl.constexpr = qkv.dtype.element_ty
    half = tl.arange(0, HALF)[None, :]
    columns = tl.arange(0, D)[None, :]
    # Positions and slots were written many kernels ago.
    position = tl.load(positions + token)
    slot = tl.load(slots + token).to(tl.int64)
    cos = tl.load(rotary + position * D + half).to(tl.float32)
    sin = tl.load(rotary + position * D + HALF + half).to(tl.float32)
    norm_first, norm_second = load_norm(k_norm, D, NORM)
    wait_for_predecessor(PDL)
    queries = qkv + token * (H + 2 * KVH) * D
    keys = queries + H * D
    heads = tl.arange(0, KVH_PAD)[:, None]
    mask = heads < KVH
    values = tl.load(keys + KVH * D + heads * D + columns, mask=mask)
    # The tokens of the same chunk read the rotated keys where they lie; those of later steps in the cache.
    first, second = _rotate_heads(keys, KVH, norm_first, norm_second, cos, sin, eps, D, KVH_PAD, NORM, dtype)
    out = (slot * KVH + heads) * D
    tl.store(key_cache + out + half, first, mask=mask)
    tl.store(key_cache + out + HALF + half, second, mask=mask)
    tl.store(value_cache + out + columns, values, mask=mask)
    if QUERIES:
        norm_first, norm_second = load_norm(q_norm, D, NORM)
        _rotate_heads(queries, H, norm_first, norm_second, cos, sin, eps, D, H_PAD, NORM, dtype)


_kernel = Kernel(_store_kv)


def store_kv(
    qkv: torch.Tensor, k_norm: torch.Tensor | None, eps: float, rotary: torch.Tensor, positions: torch.Tensor,
    slots: torch.Tensor, cache: torch.Tensor, *, q_norm: torch.Tensor | None = None, rotates_queries: bool = False,
) -> None:  # fmt: skip
    """Normalises and rotates k in place, and stores it and v. q too is normalised and rotated, if rotates_queries.

    qkv (tokens, heads + 2 KV heads, head_dim), rotary (positions, 2, head_dim // 2), positions and slots (tokens,)
    int32, cache (2, blocks, block_size, KV heads, head_dim); head_dim a power of two. k_norm and q_norm (head_dim,) or
    None for no norm; of a model both or neither.
    """
    num_tokens, num_all, head_dim = qkv.shape
    num_kv_heads = cache.shape[3]
    num_heads = num_all - 2 * num_kv_heads
    assert not rotates_queries or (q_norm is None) == (k_norm is None), "a model has both norms or neither"
    _kernel(
        # A pointer that is not used must still be one.
        (num_tokens, 1, 1), qkv, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, rotary,
        positions, slots, cache[0], cache[1], eps,
        H=num_heads, KVH=num_kv_heads, D=head_dim, H_PAD=triton.next_power_of_2(num_heads),
        KVH_PAD=triton.next_power_of_2(num_kv_heads), NORM=k_norm is not None, QUERIES=rotates_queries,
        PDL=supports_pdl(qkv.device), num_warps=4 if rotates_queries else 2,
    )  # fmt: skip
