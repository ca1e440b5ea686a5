"""What a transformer layer is made of, as few operations: one small interface, and its plain torch implementation.

The plain one is the reference that faster ones are tested against, and what a CPU runs. Attention is an interface of
its own (attention/backend.py), as there are more implementations of it than of the rest.
"""

from typing import Protocol

import torch
from torch.nn.functional import linear, silu

from tandem_worker.attention.backend import Attention
from tandem_worker.attention.torch_attention import TorchAttention
from tandem_worker.layers.experts import Experts, mix_experts
from tandem_worker.layers.norm import RMSNorm


class Operations(Protocol):
    """x is (tokens, hidden_size) or an inner size; weights are (outputs, inputs)."""

    @property
    def attention(self) -> Attention: ...

    def norm_linear(
        self, x: torch.Tensor, norm: RMSNorm, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """RMSNorm, then a linear layer: (tokens, outputs). Written to `out` where it is given."""

    def norm_gate_up(self, x: torch.Tensor, norm: RMSNorm, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm, then silu(gate) * up, the weight holding the gate's rows above the up's: (tokens, inner)."""

    def linear_add(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual (tokens, outputs) plus a linear layer of x; may be in place."""

    def linear_over(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """A linear layer of x without the residual, whose place it may take."""

    def norm_experts(self, x: torch.Tensor, norm: RMSNorm, experts: Experts) -> torch.Tensor:
        """RMSNorm, then the weighted sum of the experts' MLPs that each token is routed to: (tokens, hidden_size)."""


class TorchOperations:
    """Plain torch, on any device and in any floating type."""

    def __init__(self) -> None:
        self.attention = TorchAttention()

    def norm_linear(
        self, x: torch.Tensor, norm: RMSNorm, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        result = linear(norm(x), weight)
        return result if out is None else out.copy_(result)

    def norm_gate_up(self, x: torch.Tensor, norm: RMSNorm, weight: torch.Tensor) -> torch.Tensor:
        gate, up = linear(norm(x), weight).chunk(2, dim=-1)
        return silu(gate) * up

    def linear_add(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + linear(x, weight)

    def linear_over(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return linear(x, weight)

    def norm_experts(self, x: torch.Tensor, norm: RMSNorm, experts: Experts) -> torch.Tensor:
        return mix_experts(norm(x), experts)
