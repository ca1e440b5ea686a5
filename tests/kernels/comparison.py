"""Inputs of kernel tests, and the comparison of outputs with plain torch."""

from typing import Any

import pytest
import torch

EPS = 1e-6
ON_GPU = torch.cuda.is_available()
# The interpreter multiplies the bits of bfloat16 matrices.
DTYPE = torch.bfloat16 if ON_GPU else torch.float16


def slow_in_interpreter(*values: Any) -> Any:
    """Parameters of a test that is left to make test-slow where the interpreter runs it; a GPU always runs it."""
    return pytest.param(*values, marks=() if ON_GPU else pytest.mark.slow)


def random(*shape: int, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(DTYPE).to(device)


def assert_near(out: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-2) -> None:
    out, expected = out.double(), expected.double()
    assert out.shape == expected.shape
    assert out.isfinite().all()
    assert (out - expected).norm() / expected.norm() < tolerance


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
