"""The operations of a layer on an NVIDIA GPU in bfloat16: Triton kernels for few tokens, cuBLAS for many."""

import torch
from torch.nn.functional import linear

from tandem_worker.attention.backend import CapturableAttention
from tandem_worker.kernels.experts import mix_experts_grouped
from tandem_worker.kernels.linear import few_token_linear, skinny_linear, suits_few_token_linear, suits_skinny_linear
from tandem_worker.kernels.norm import rms_norm, silu_mul
from tandem_worker.layers.experts import Experts, route
from tandem_worker.layers.norm import RMSNorm


class TritonOperations:
    """The attention is given, as there are several for a GPU."""

    def __init__(self, attention: CapturableAttention) -> None:
        self.attention = attention

    def norm_linear(
        self, x: torch.Tensor, norm: RMSNorm, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if suits_few_token_linear(len(x), x.shape[1]):
            return few_token_linear(x, weight, norm=norm.weight, eps=norm.eps, out=out)
        x = rms_norm(x, norm.weight, norm.eps)
        if out is not None:
            return torch.mm(x, weight.t(), out=out)
        return skinny_linear(x, weight) if suits_skinny_linear(len(x), weight) else linear(x, weight)

    def norm_gate_up(self, x: torch.Tensor, norm: RMSNorm, weight: torch.Tensor) -> torch.Tensor:
        if suits_few_token_linear(len(x), x.shape[1]):
            return few_token_linear(x, weight, norm=norm.weight, eps=norm.eps, silu_mul=True)
        x = rms_norm(x, norm.weight, norm.eps)
        return (
            skinny_linear(x, weight, silu_mul=True)
            if suits_skinny_linear(len(x), weight)
            else silu_mul(linear(x, weight))
        )

    def linear_add(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if suits_few_token_linear(len(x), x.shape[1]):
            return few_token_linear(x, weight, residual=residual)
        return residual.addmm_(x, weight.t())

    def linear_over(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if suits_few_token_linear(len(x), x.shape[1]):
            return few_token_linear(x, weight, out=residual)
        return torch.mm(x, weight.t(), out=residual)

    def norm_experts(self, x: torch.Tensor, norm: RMSNorm, experts: Experts) -> torch.Tensor:
        x = rms_norm(x, norm.weight, norm.eps)
        return mix_experts_grouped(x, experts.gate_up, experts.down, *route(x, experts))
