"""What a Qwen3 layer is made of, as few operations: one small interface, and the plain torch implementation of it.

The plain one is the reference that faster ones are tested against, and what a CPU runs.
"""

from typing import Any, Protocol

import torch
from torch.nn.functional import linear, silu

from tandem_worker.layers.attention import AttentionMetadata, torch_attention
from tandem_worker.layers.experts import Experts, mix_experts
from tandem_worker.layers.norm import RMSNorm
from tandem_worker.layers.rotary import apply_rotary


class Operations(Protocol):
    """x is (tokens, hidden_size) or an inner size; weights are (outputs, inputs)."""

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

    def attention(
        self,
        qkv: torch.Tensor,
        q_norm: RMSNorm,
        k_norm: RMSNorm,
        rotary_table: torch.Tensor,
        cache: torch.Tensor,
        metadata: Any,
    ) -> torch.Tensor:
        """QK-norm, rotary embedding, KV store and attention.

        qkv (tokens, heads + 2 KV heads, head_dim), may be overwritten; rotary_table (positions, 2, head_dim // 2);
        cache (2, blocks, block_size, KV heads, head_dim); metadata is the implementation's own. Gives (tokens, heads *
        head_dim). Stores all k and v that it is given before it reads any.
        """


class TorchOperations:
    """Plain torch, on any device and in any floating type."""

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

    def attention(
        self,
        qkv: torch.Tensor,
        q_norm: RMSNorm,
        k_norm: RMSNorm,
        rotary_table: torch.Tensor,
        cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        num_kv_heads = cache.shape[3]
        q, k, v = qkv.split([qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        rotary = rotary_table[metadata.positions]
        q, k = apply_rotary(q_norm(q), rotary), apply_rotary(k_norm(k), rotary)
        return torch_attention(q, k, v, cache, metadata).flatten(1)
