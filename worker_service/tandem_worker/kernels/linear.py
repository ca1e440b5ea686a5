"""Linear layers over few tokens, whose time is that of reading the weights: y = f(x) W^T.

They can also do what comes before or after the product in a transformer layer: SiLU-and-multiply after it, and for very
few tokens RMSNorm before it or the addition of the residual after it. They may start while the one before still runs.
"""

import torch
import triton
import triton.language as tl

from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel, supports_pdl

FEW_TOKENS = 4
FEW_ELEMENTS = 4096
FEW_N = 2
"""Rows of weights that a program of one or two warps reads: many small programs have the most loads under way"""
SKINNY_TOKENS = 64
SKINNY_OUTPUTS = 32768
"""Outputs of the widest layer: each program reads all tokens for its few outputs, so wide layers read them often"""
SKINNY_N = 32
SKINNY_K = 128


@triton.jit
def _vector_linear(
    x, norm, weight, residual, out, N, eps,
    K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, SILU_MUL: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A vector product for each token: each program reads BLOCK_N rows of the weights, a tile at a time, the first
    before it waits for x.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    columns = tl.arange(0, BLOCK_K)
    places = weight + rows.to(tl.int64)[:, None] * K + columns[None, :]
    mask = in_rows[:, None] & (columns < K)[None, :]
    tile = tl.load(places, mask=mask, other=0.0)
    if SILU_MUL:
        up_tile = tl.load(places + N.to(tl.int64) * K, mask=mask, other=0.0)
    wait_for_predecessor(PDL)
    tokens = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        in_columns = start + columns < K
        if start > 0:
            mask = in_rows[:, None] & in_columns[None, :]
            tile = tl.load(places + start, mask=mask, other=0.0)
            if SILU_MUL:
                up_tile = tl.load(places + start + N.to(tl.int64) * K, mask=mask, other=0.0)
        if NORM:
            scale = tl.load(norm + start + columns, mask=in_columns, other=0.0).to(tl.float32)
        for token in tl.static_range(TOKENS):
            values = tl.load(x + token * K + start + columns, mask=in_columns, other=0.0).to(tl.float32)
            if NORM:
                square += tl.where(tokens == token, tl.sum(values * values, axis=0), 0.0)
                values = values * scale
            part = tl.sum(tile.to(tl.float32) * values[None, :], axis=1)
            acc += tl.where(tokens[:, None] == token, part[None, :], 0.0)
            if SILU_MUL:
                part = tl.sum(up_tile.to(tl.float32) * values[None, :], axis=1)
                up_acc += tl.where(tokens[:, None] == token, part[None, :], 0.0)
    if NORM:
        inverse = tl.rsqrt(square / K + eps)[:, None]
        acc *= inverse
        up_acc *= inverse
    if SILU_MUL:
        acc = acc * tl.sigmoid(acc) * up_acc
    where = tokens[:, None] * N + rows[None, :]
    mask = (tokens < TOKENS)[:, None] & in_rows[None, :]
    if RESIDUAL:
        acc += tl.load(residual + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _skinny_linear(
    x, weight, out, num_tokens, N,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SILU_MUL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_N outputs of all tokens: with SILU_MUL from BLOCK_N rows of gates and as many of ups."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    weights = weight + rows.to(tl.int64)[None, :] * K + columns[:, None]
    up_weights = weights + N.to(tl.int64) * K
    values = x + (tokens % num_tokens)[:, None] * K + columns[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    wait_for_predecessor(PDL)
    for start in range(0, K, BLOCK_K):
        tile = tl.load(values + start)
        acc = tl.dot(tile, tl.load(weights + start), acc)
        if SILU_MUL:
            up_acc = tl.dot(tile, tl.load(up_weights + start), up_acc)
    if SILU_MUL:
        acc = acc * tl.sigmoid(acc) * up_acc
    where = tokens[:, None] * N + rows[None, :]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=(tokens < num_tokens)[:, None])


_kernel = Kernel(_vector_linear)
_skinny_kernel = Kernel(_skinny_linear)


def suits_few_token_linear(num_tokens: int, width: int) -> bool:
    """Whether few_token_linear is the fastest: past that, multiplying on the CUDA cores takes longer than reading."""
    return num_tokens == 1 or (num_tokens <= FEW_TOKENS and num_tokens * width <= FEW_ELEMENTS)


def few_token_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    silu_mul: bool = False,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (tokens, K), weight (N, K) -> (tokens, N), written to `out` where it is given. It takes any number of tokens,
    but is fast only where suits_few_token_linear.

    norm (K,): x goes through RMSNorm first. silu_mul: weight holds gates above ups, and the output is silu(gate) * up,
    (tokens, N // 2). residual (tokens, N): the product is added to it, in place.
    """
    num_tokens, width = x.shape
    num_outputs = weight.shape[0] // 2 if silu_mul else weight.shape[0]
    if residual is not None:
        out = residual
    elif out is None:
        out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    block_k, num_warps = (512, 1) if width <= 1024 else (2048, 2)
    _kernel(
        (triton.cdiv(num_outputs, FEW_N), 1, 1),
        # A pointer that is not used must still be one.
        x, weight if norm is None else norm, weight, out, out, num_outputs, eps,
        K=width, TOKENS=num_tokens, BLOCK_M=triton.next_power_of_2(num_tokens), BLOCK_N=FEW_N, BLOCK_K=block_k,
        NORM=norm is not None, SILU_MUL=silu_mul, RESIDUAL=residual is not None, PDL=supports_pdl(x.device),
        num_warps=num_warps,
    )  # fmt: skip
    return out


def suits_skinny_linear(num_tokens: int, weight: torch.Tensor) -> bool:
    """Whether skinny_linear can do it, and is to be preferred to cuBLAS: tried with 3072 outputs and more."""
    num_outputs, width = weight.shape
    fits = num_outputs % (2 * SKINNY_N) == 0 and width % SKINNY_K == 0
    return fits and num_tokens <= SKINNY_TOKENS and num_outputs <= SKINNY_OUTPUTS


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, *, silu_mul: bool = False) -> torch.Tensor:
    """x (tokens, K), weight (N, K) -> (tokens, N), where suits_skinny_linear. For silu_mul see few_token_linear."""
    num_tokens, width = x.shape
    num_outputs = weight.shape[0] // 2 if silu_mul else weight.shape[0]
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    _skinny_kernel(
        (num_outputs // SKINNY_N, 1, 1),
        x, weight, out, num_tokens, num_outputs,
        K=width, BLOCK_M=16 if num_tokens <= 16 else SKINNY_TOKENS, BLOCK_N=SKINNY_N, BLOCK_K=SKINNY_K,
        SILU_MUL=silu_mul, PDL=supports_pdl(x.device), num_warps=4, num_stages=3 if silu_mul else 4,
    )  # fmt: skip
    return out
