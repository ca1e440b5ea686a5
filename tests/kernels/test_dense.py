"""Kernels for norms, linear layers and experts, compared with plain torch in float64 on random inputs.

They run through Triton's interpreter, or on a GPU. Outputs are poisoned first, and so is what a kernel must not read.
"""

import pytest
import torch
from torch.nn.functional import linear, silu

from tandem_worker.kernels.experts import mix_experts_grouped
from tandem_worker.kernels.linear import SKINNY_OUTPUTS, few_token_linear, skinny_linear, suits_skinny_linear
from tandem_worker.kernels.norm import rms_norm, silu_mul
from tests.kernels.comparison import DTYPE, EPS, assert_near, normed, random

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1024), (3, 96), (5, 5120)])
def test_rms_norm(device: torch.device, num_tokens: int, size: int) -> None:
    x, weight = random(num_tokens, size, device=device), random(size, device=device)
    assert_near(rms_norm(x, weight, EPS), normed(x, weight))


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 64), (3, 3072), (2, 37)])
def test_silu_mul(device: torch.device, num_tokens: int, size: int) -> None:
    x = random(num_tokens, 2 * size, device=device)
    gate, up = x.double().chunk(2, dim=-1)
    assert_near(silu_mul(x), silu(gate) * up)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_outputs", "width"), [(48, 128), (130, 256), (64, 384), (100, 1152)])
def test_few_token_linear(device: torch.device, num_tokens: int, num_outputs: int, width: int) -> None:
    x, norm = random(num_tokens, width, device=device), random(width, device=device)
    weight = random(num_outputs, width, device=device, scale=width**-0.5)
    residual = random(num_tokens, num_outputs, device=device)
    assert_near(few_token_linear(x, weight), linear(x.double(), weight.double()))
    expected = residual.double() + linear(x.double(), weight.double())
    assert few_token_linear(x, weight, residual=residual) is residual
    assert_near(residual, expected)
    expected = linear(normed(x, norm), weight.double())
    assert_near(few_token_linear(x, weight, norm=norm, eps=EPS), expected)
    gate, up = expected.chunk(2, dim=-1)
    assert_near(few_token_linear(x, weight, norm=norm, eps=EPS, silu_mul=True), silu(gate) * up)


@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17, 64])
@pytest.mark.parametrize(("num_outputs", "width"), [(64, 128), (192, 640)])
def test_skinny_linear(device: torch.device, num_tokens: int, num_outputs: int, width: int) -> None:
    x = random(num_tokens, width, device=device)
    weight = random(num_outputs, width, device=device, scale=width**-0.5)
    assert suits_skinny_linear(num_tokens, weight)
    expected = linear(x.double(), weight.double())
    assert_near(skinny_linear(x, weight), expected)
    gate, up = expected.chunk(2, dim=-1)
    assert_near(skinny_linear(x, weight, silu_mul=True), silu(gate) * up)


def test_what_is_not_skinny() -> None:
    weight = torch.empty(SKINNY_OUTPUTS + 64, 256, device="meta")
    assert suits_skinny_linear(64, weight[64:])
    assert not suits_skinny_linear(65, weight[64:])
    assert not suits_skinny_linear(1, weight)
    assert not suits_skinny_linear(1, weight[:96])
    assert not suits_skinny_linear(1, weight[:64, :192])


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), [(1, 8, 8), (5, 3, 2), (150, 5, 2), (70, 1, 1)])
@pytest.mark.parametrize(("hidden_size", "inner"), [(96, 40), (128, 144)])
def test_experts(
    device: torch.device, num_tokens: int, num_experts: int, num_chosen: int, hidden_size: int, inner: int
) -> None:
    """With an expert that no token chooses, where there are enough."""
    x = random(num_tokens, hidden_size, device=device)
    gate_up = random(num_experts, 2 * inner, hidden_size, device=device, scale=hidden_size**-0.5)
    down = random(num_experts, hidden_size, inner, device=device, scale=inner**-0.5)
    scores = torch.rand(num_tokens, num_experts)
    if num_experts > num_chosen:
        scores[:, 1] = -1
    weights, chosen = (values.to(device) for values in scores.topk(num_chosen))
    weights = weights.to(DTYPE)
    expected = torch.zeros(num_tokens, hidden_size, dtype=torch.float64, device=device)
    for token in range(num_tokens):
        for weight, expert in zip(weights[token].double(), chosen[token], strict=True):
            gate, up = linear(x[token].double(), gate_up[expert].double()).chunk(2)
            expected[token] += weight * linear(silu(gate) * up, down[expert].double())
    assert_near(mix_experts_grouped(x, gate_up, down, weights, chosen), expected)
