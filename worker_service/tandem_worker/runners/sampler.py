"""Logits to tokens, without a host sync. Stateless: the noise of a token is a function of (seed, choice index,
position, token id), so a sequence that is preempted, moved or replayed draws the same numbers.
"""

from dataclasses import dataclass

import torch

GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
"""SplitMix64's increment (Steele, Lea, Flood 2014), as a signed 64-bit number."""
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class SamplingRows:
    """The sampling rows' options, each (rows,). temperature 0 is greedy, top_k 0 is all."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    """int64 with the bits of the uint64"""
    choice_index: torch.Tensor
    position: torch.Tensor
    """int64: where in the sequence the sampled token will stand"""


def sample(logits: torch.Tensor, rows: SamplingRows, *, any_random: bool, any_truncated: bool) -> torch.Tensor:
    """logits (rows, vocab) -> token ids (rows,) int64. Ties go to the lowest id.

    any_random and any_truncated say whether a row has a temperature, and whether one has top-k, top-p or min-p.
    """
    greedy = logits.argmax(-1)
    if not any_random:
        return greedy
    is_greedy = rows.temperature == 0
    # Relative to the row's largest, so that no temperature, however small, makes them overflow.
    below = logits - logits.amax(-1, keepdim=True)
    scaled = below / torch.where(is_greedy, 1.0, rows.temperature).to(logits.dtype)[:, None]
    if any_truncated:
        scaled = truncate(scaled, rows.top_k, rows.top_p, rows.min_p)
    noise = gumbel_noise(rows.seed, rows.choice_index, rows.position, logits.shape[1]).to(logits.dtype)
    return torch.where(is_greedy, greedy, (scaled + noise).argmax(-1))


def truncate(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Sets to -inf what top-k (Fan et al. 2018), then top-p (Holtzman et al. 2019), then min-p (Nguyen et al. 2024)
    leave out. The likeliest token always stays; of equal ones the lowest ids do.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[1], device=logits.device)
    keep = (ranks < top_k[:, None]) | (top_k == 0)[:, None]
    probabilities = ordered.masked_fill(~keep, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep &= (before < top_p.to(logits.dtype)[:, None]) | (top_p >= 1)[:, None]
    keep &= probabilities >= min_p.to(logits.dtype)[:, None] * probabilities[:, :1]
    keep[:, 0] = True
    return torch.full_like(logits, -torch.inf).scatter(1, ids, ordered.masked_fill(~keep, -torch.inf))


def gumbel_noise(
    seed: torch.Tensor, choice_index: torch.Tensor, position: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """(rows, vocab_size) float64 Gumbel noise: the argmax of logits + noise is a draw from their softmax.

    Each row's key starts a SplitMix64 stream; the key is that generator's finaliser over seed, choice and position in
    turn. The stream's i-th number, from 0, serves two token ids: 2 i takes its upper half, 2 i + 1 its lower. Integers
    wrap alike on every device.
    """
    key = _mix(seed + GOLDEN_GAMMA)
    key = _mix(key + choice_index * GOLDEN_GAMMA + 1)
    key = _mix(key + position * GOLDEN_GAMMA + 2)
    steps = torch.arange(1, (vocab_size + 1) // 2 + 1, device=seed.device) * GOLDEN_GAMMA
    bits = _mix(key[:, None] + steps)
    halves = torch.stack([_shift_right(bits, 32), bits & 0xFFFFFFFF], dim=-1).flatten(1)[:, :vocab_size]
    uniform = (halves.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser."""
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, count: int) -> torch.Tensor:
    """A logical shift of int64's bits."""
    return (x >> count) & ((1 << (64 - count)) - 1)
