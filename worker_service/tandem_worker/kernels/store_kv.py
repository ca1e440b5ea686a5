"""k's norm and rotary embedding, in place, with the KV store, fused: one program a token."""

import torch
import triton
import triton.language as tl

from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel, supports_pdl


@triton.jit
def normalize_and_rotate(first, second, norm_first, norm_second, cos, sin, eps, D: tl.constexpr, dtype: tl.constexpr):
    """RMSNorm over the head's dimension, then rotation. first and second are the halves of heads, (n, D // 2) float32;
    norms, cos and sin (n or 1, D // 2). Rounded to dtype where plain torch rounds.
    """
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    inverse = tl.rsqrt(square / D + eps)[:, None]
    first = (first * inverse * norm_first).to(dtype).to(tl.float32)
    second = (second * inverse * norm_second).to(dtype).to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _store_kv(
    qkv, k_norm, rotary, positions, slots, key_cache, value_cache, eps,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, KVH_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = D // 2
    half = tl.arange(0, HALF)[None, :]
    columns = tl.arange(0, D)[None, :]
    # Written many kernels ago.
    position = tl.load(positions + token)
    slot = tl.load(slots + token).to(tl.int64)
    cos = tl.load(rotary + position * D + half).to(tl.float32)
    sin = tl.load(rotary + position * D + HALF + half).to(tl.float32)
    norm_first = tl.load(k_norm + half).to(tl.float32)
    norm_second = tl.load(k_norm + HALF + half).to(tl.float32)
    wait_for_predecessor(PDL)
    heads = tl.arange(0, KVH_PAD)[:, None]
    mask = heads < KVH
    keys = qkv + (token * (H + 2 * KVH) + H) * D + heads * D
    first = tl.load(keys + half, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(keys + HALF + half, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(keys + KVH * D + columns, mask=mask)
    first, second = normalize_and_rotate(first, second, norm_first, norm_second, cos, sin, eps, D, qkv.dtype.element_ty)
    # For the tokens of the same chunk, which read it here.
    tl.store(keys + half, first, mask=mask)
    tl.store(keys + HALF + half, second, mask=mask)
    out = (slot * KVH + heads) * D
    tl.store(key_cache + out + half, first, mask=mask)
    tl.store(key_cache + out + HALF + half, second, mask=mask)
    tl.store(value_cache + out + columns, values, mask=mask)


_kernel = Kernel(_store_kv)


def store_kv(
    qkv: torch.Tensor, k_norm: torch.Tensor, eps: float, rotary: torch.Tensor, positions: torch.Tensor,
    slots: torch.Tensor, cache: torch.Tensor,
) -> None:  # fmt: skip
    """Normalises and rotates k in place, and stores it and v.

    qkv (tokens, heads + 2 KV heads, head_dim), rotary (positions, 2, head_dim // 2), positions and slots (tokens,)
    int32, cache (2, blocks, block_size, KV heads, head_dim); head_dim a power of two.
    """
    num_tokens, num_all, head_dim = qkv.shape
    num_kv_heads = cache.shape[3]
    _kernel(
        (num_tokens, 1, 1), qkv, k_norm, rotary, positions, slots, cache[0], cache[1], eps,
        H=num_all - 2 * num_kv_heads, KVH=num_kv_heads, D=head_dim, KVH_PAD=triton.next_power_of_2(num_kv_heads),
        PDL=supports_pdl(qkv.device), num_warps=2,
    )  # fmt: skip
