"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with YaRN scaling."""

import math

import torch

from tandem_worker.checkpoint.model_config import ModelConfig, YarnScaling


def build_rotary_table(config: ModelConfig, num_positions: int, dtype: torch.dtype) -> torch.Tensor:
    """The cosines and sines of every position's angles, (num_positions, 2, head_dim // 2).

    Angles are computed in float32 whatever the model's type: that is how the models were trained.
    """
    frequencies = _frequencies(config)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    scale = config.yarn.attention_factor if config.yarn else 1.0
    return torch.stack([angles.cos() * scale, angles.sin() * scale], dim=1).to(dtype)


def apply_rotary(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotates x, (tokens, heads, head_dim), by the tokens' rows of the table, (tokens, 2, head_dim // 2)."""
    cos, sin = table[:, None, 0], table[:, None, 1]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _frequencies(config: ModelConfig) -> torch.Tensor:
    """The angle between neighbouring positions in each pair of dimensions, (head_dim // 2,) radians."""
    powers = config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if config.yarn is None:
        return 1.0 / powers
    low, high = _correction_range(config.yarn, config.head_dim, config.rope_theta)
    ramp = ((torch.arange(config.head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return ramp / (config.yarn.factor * powers) + (1 - ramp) / powers


def _correction_range(yarn: YarnScaling, dim: int, base: float) -> tuple[float, float]:
    """The pairs of dimensions between which YaRN goes over from keeping frequencies to interpolating positions."""

    def dimension_of(num_rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (num_rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high
