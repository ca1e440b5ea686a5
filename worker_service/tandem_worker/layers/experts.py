"""A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538) in plain torch, as Qwen3-MoE has it."""

from dataclasses import dataclass

import torch
from torch.nn.functional import linear, silu


@dataclass(frozen=True)
class Experts:
    """Weights, and how tokens are routed."""

    router: torch.Tensor
    """(experts, hidden_size)"""
    gate_up: torch.Tensor
    """(experts, 2 * inner, hidden_size): the gate's rows above the up's"""
    down: torch.Tensor
    """(experts, hidden_size, inner)"""
    num_chosen: int
    """The number of experts that compute a token"""
    is_normalised: bool
    """Whether the chosen experts' weights are made to add up to 1"""


def route(x: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights, of x's type, and the numbers of the experts that each token is routed to, (tokens, chosen) both.

    x (tokens, hidden_size).
    """
    weights, chosen = linear(x, experts.router).softmax(-1, dtype=torch.float32).topk(experts.num_chosen)
    if experts.is_normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(x.dtype), chosen


def mix_experts(x: torch.Tensor, experts: Experts) -> torch.Tensor:
    """(tokens, hidden_size) -> the weighted sum of the MLPs that each token is routed to. Waits for the device."""
    weights, chosen = route(x, experts)
    out = torch.zeros_like(x)
    # In the order of the experts, so that a token's sum does not depend on the tokens beside it.
    for expert in chosen.unique().tolist():
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        gate, up = linear(x[tokens], experts.gate_up[expert]).chunk(2, dim=-1)
        result = linear(silu(gate) * up, experts.down[expert])
        out.index_add_(0, tokens, result * weights[tokens, places, None])
    return out
