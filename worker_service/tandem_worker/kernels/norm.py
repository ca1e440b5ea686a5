"""Row-wise kernels over (tokens, size): RMSNorm, SiLU-and-multiply."""

import torch
import triton
import triton.language as tl

from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel, supports_pdl


@triton.jit
def _rms_norm(x, weight, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    scale = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    row = tl.program_id(0).to(tl.int64) * SIZE
    values = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)
    tl.store(out + row + columns, (values * inverse * scale).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_predecessor(PDL)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up + row * 2 * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


_rms_norm_kernel = Kernel(_rms_norm)
_silu_mul_kernel = Kernel(_silu_mul)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (tokens, size), contiguous -> the same shape."""
    out = torch.empty_like(x)
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    _rms_norm_kernel(
        (len(x), 1, 1), x, weight, out, eps,
        SIZE=size, BLOCK=block, PDL=supports_pdl(x.device), num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """(tokens, 2 x size), contiguous: the gates, then the ups -> silu(gate) * up, (tokens, size)."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, triton.next_power_of_2(size))
    _silu_mul_kernel(
        (num_tokens, triton.cdiv(size, block), 1), gate_up, out, SIZE=size, BLOCK=block, PDL=supports_pdl(out.device)
    )
    return out
