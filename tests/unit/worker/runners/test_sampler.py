"""The sampler against brute force in numpy, and its draws against the probabilities that they should have."""

import numpy as np
import pytest
import torch

from tandem_worker.runners.sampler import SamplingRows, gumbel_noise, sample, truncate

VOCAB = 50


def make_rows(
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    position: torch.Tensor | None = None,
) -> SamplingRows:
    return SamplingRows(
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        min_p=torch.full((count,), min_p),
        seed=torch.full((count,), seed),
        choice_index=torch.zeros(count, dtype=torch.int64),
        position=torch.arange(count) if position is None else position,
    )


def brute_force_kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Ids that survive top-k, then top-p, then min-p, one row."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[:top_k] if top_k else order
    weights = np.exp(logits[kept] - logits[kept[0]])
    weights /= weights.sum()
    survivors, total = [], 0.0
    for token_id, weight in zip(kept, weights, strict=True):
        if total < top_p or top_p >= 1:
            survivors.append((token_id, weight))
        total += weight
    return {token_id for token_id, weight in survivors if weight >= min_p * weights[0]}


@pytest.mark.parametrize("top_k", [0, 1, 7, VOCAB, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_truncation_keeps_what_brute_force_keeps(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(top_k).normal(0, 2, (8, VOCAB)))
    rows = make_rows(8, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = truncate(logits, rows.top_k, rows.top_p, rows.min_p)
    p = float(torch.tensor(top_p, dtype=torch.float32))
    m = float(torch.tensor(min_p, dtype=torch.float32))
    for before, after in zip(logits.numpy(), kept.numpy(), strict=True):
        assert set(np.flatnonzero(np.isfinite(after)).tolist()) == brute_force_kept(before, top_k, p, m)
        assert (after[np.isfinite(after)] == before[np.isfinite(after)]).all()


def test_each_row_has_its_own_options() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (4, VOCAB)))
    rows = make_rows(4)
    rows.temperature[:] = torch.tensor([0.0, 1.0, 1.0, 0.0])
    rows.top_k[:] = torch.tensor([0, 1, 0, 5])
    rows.top_p[:] = torch.tensor([1.0, 1.0, 1e-6, 1.0])
    assert torch.equal(sample(logits, rows, any_random=True, any_truncated=True), logits.argmax(-1))


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(3, VOCAB, dtype=torch.float64)
    logits[:, [9, 30, 31]] = 5.0
    assert sample(logits, make_rows(3), any_random=False, any_truncated=False).tolist() == [9, 9, 9]
    rows = make_rows(3, top_k=2)
    kept = truncate(logits, rows.top_k, rows.top_p, rows.min_p)
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in kept.numpy()] == [[9, 30]] * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    count = 60_000
    one = torch.from_numpy(np.random.default_rng(1).normal(0, 1.5, VOCAB))
    rows = make_rows(count, temperature=temperature, seed=12345)
    drawn = sample(one.expand(count, -1), rows, any_random=True, any_truncated=False)
    observed = np.bincount(drawn.numpy(), minlength=VOCAB)
    expected = (one / temperature).softmax(-1).numpy() * count
    likely = expected >= 5
    chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    # Mean likely.sum() - 1; five standard deviations.
    degrees = likely.sum() - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_temperature_is_greedy(dtype: torch.dtype) -> None:
    logits = torch.from_numpy(np.random.default_rng(2).normal(5, 2, (6, VOCAB))).to(dtype)
    rows = make_rows(6, temperature=1e-42, top_k=10, top_p=0.9)
    for any_truncated in (False, True):
        assert torch.equal(sample(logits, rows, any_random=True, any_truncated=any_truncated), logits.argmax(-1))


def test_noise_is_standard_gumbel_and_independent_of_its_neighbours() -> None:
    positions = torch.arange(400)
    seeds = torch.zeros(400, dtype=torch.int64)
    noise = gumbel_noise(seeds, seeds, positions, 500).numpy()
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.015)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.04)
    for other in (
        gumbel_noise(seeds + 1, seeds, positions, 500),
        gumbel_noise(seeds, seeds + 1, positions, 500),
        gumbel_noise(seeds, seeds, positions + 1, 500),
    ):
        assert abs(np.corrcoef(noise.ravel(), other.numpy().ravel())[0, 1]) < 0.012
    assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.012


def test_noise_depends_on_nothing_but_its_key() -> None:
    """Known values: a change of the construction would change every seeded output."""
    key = [torch.tensor([value]) for value in (42, 1, 100)]
    noise = gumbel_noise(*key, 4)[0]
    assert torch.equal(gumbel_noise(*key, 3)[0], noise[:3])
    expected = [slow_gumbel(42, 1, 100, token_id) for token_id in range(4)]
    np.testing.assert_allclose(noise.numpy(), expected, rtol=1e-12)


def slow_gumbel(seed: int, choice_index: int, position: int, token_id: int) -> float:
    """The construction in Python's integers."""
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = mix((seed + gamma) & mask)
    key = mix((key + choice_index * gamma + 1) & mask)
    key = mix((key + position * gamma + 2) & mask)
    bits = mix((key + (token_id // 2 + 1) * gamma) & mask)
    half = bits & 0xFFFFFFFF if token_id % 2 else bits >> 32
    return float(-np.log(-np.log((half + 0.5) * 2.0**-32)))
