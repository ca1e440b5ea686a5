"""The sampling kernels against tandem_worker/runners/sampler.py, the plain reference."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tandem_worker.kernels.sampling import MAX_TOP_K, SamplingKernels
from tandem_worker.ranks.shard import Shard
from tandem_worker.runners.sampler import SamplingRows, sample
from tests.kernels.comparison import ON_GPU, slow_in_interpreter

VOCAB = 5000
# The interpreter's numpy warns of -inf - -inf, which the kernels allow for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Case:
    """Rows of one batch, with what both samplers are given."""

    def __init__(self, logits: torch.Tensor, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_rows, self.device = len(logits), device
        self.logits = logits.bfloat16().to(device)

        def integers(high: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randint(0, high, (self.num_rows,), generator=generator).to(device, dtype)

        self.options = {
            "temperature": torch.full((self.num_rows,), 0.8, device=device),
            "top_k": torch.zeros(self.num_rows, dtype=torch.int32, device=device),
            "top_p": torch.ones(self.num_rows, device=device),
            "min_p": torch.zeros(self.num_rows, device=device),
            "seed": integers(2**62, torch.int64) - 2**61,
            "choice_index": integers(3, torch.int64),
        }
        self.context_lens = integers(4000, torch.int32)
        self.rows = torch.randperm(self.num_rows, generator=generator).to(device, torch.int32)

    def sample(self, *, is_truncated: bool) -> torch.Tensor:
        """Tokens in the order of rows; logits' row i belongs to the i-th of rows."""
        kernels = SamplingKernels(self.num_rows, self.logits.shape[1], self.device)
        out = torch.full((self.num_rows,), -7, dtype=torch.int32, device=self.device)
        last = torch.full((self.num_rows,), -7, dtype=torch.int32, device=self.device)
        kernels(self.logits, self.rows, self.context_lens, self.options, last, out, is_truncated=is_truncated)
        assert torch.equal(last[self.rows.long()], out.clamp(min=0))
        return out.long()

    def reference(self) -> torch.Tensor:
        rows = self.rows.long()
        o = {name: values[rows] for name, values in self.options.items()}
        options = SamplingRows(
            o["temperature"], o["top_k"].long(), o["top_p"], o["min_p"], o["seed"], o["choice_index"].long(),
            self.context_lens[rows].long(),
        )  # fmt: skip
        return sample(self.logits.float(), options, any_random=True, any_truncated=True)


def random_logits(num_rows: int, vocab_size: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size) * scale


def assert_almost_all_equal(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Noise in float32 and in float64 may order two nearly equal scores differently, rarely."""
    assert (out == expected).double().mean() > 0.99


@pytest.mark.parametrize("vocab_size", [5000, 2048, 70, 4097])
def test_greedy_and_temperature(device: torch.device, vocab_size: int) -> None:
    case = Case(random_logits(64, vocab_size), device)
    case.options["temperature"][::3] = 0
    out = case.sample(is_truncated=False)
    assert_almost_all_equal(out, case.reference())
    greedy = case.options["temperature"][case.rows.long()] == 0
    assert torch.equal(out[greedy], case.logits.float().argmax(-1)[greedy])


@pytest.mark.parametrize(
    ("vocab_size", "num_ranks"),
    [(5000, 2), slow_in_interpreter(4097, 4), slow_in_interpreter(40, 8)],
)
def test_ranks_draw_from_their_parts_of_the_vocabulary(device: torch.device, vocab_size: int, num_ranks: int) -> None:
    """One rank after the other: the first time for what they give each other, the second for the tokens."""
    case = Case(random_logits(24, vocab_size), device)
    case.options["temperature"][::3] = 0
    shares: list[torch.Tensor] = []

    def give(share: torch.Tensor) -> torch.Tensor:
        shares.append(share.clone())
        return share[None]

    def run(rank: int, all_gather: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        shard = Shard(rank, num_ranks)
        local = torch.zeros(case.num_rows, shard.vocab_share(vocab_size), dtype=torch.bfloat16, device=device)
        part = shard.vocab_part(vocab_size)
        local[:, : part.stop - part.start] = case.logits[:, part]
        kernels = SamplingKernels(case.num_rows, vocab_size, device, shard, all_gather)
        last, out = (torch.full((case.num_rows,), -7, dtype=torch.int32, device=device) for _ in range(2))
        kernels(local, case.rows, case.context_lens, case.options, last, out, is_truncated=False)
        return out.long()

    for rank in range(num_ranks):
        run(rank, give)
    gathered = torch.stack(shares)
    for rank in range(num_ranks):
        assert_almost_all_equal(run(rank, lambda _: gathered), case.reference())


def test_ties_go_to_the_lowest_id(device: torch.device) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [4000, 33, 2500]] = 5
    case = Case(logits, device)
    case.options["temperature"][:] = 0
    assert case.sample(is_truncated=False).tolist() == [33, 0]
    case.options["temperature"][:] = 1e-6
    case.options["top_k"][:] = 1
    assert case.sample(is_truncated=True).tolist() == [33, 0]


@pytest.mark.parametrize("temperature", [1e-39, 1e-30])
@pytest.mark.parametrize("is_truncated", [False, True])
def test_the_smallest_temperatures_are_greedy(device: torch.device, is_truncated: bool, temperature: float) -> None:
    case = Case(random_logits(8), device)
    case.options["temperature"][:] = temperature
    case.options["top_k"][:] = 20 if is_truncated else 0
    out = case.sample(is_truncated=is_truncated)
    assert torch.equal(case.logits.gather(1, out[:, None])[:, 0], case.logits.amax(-1))


def truncated_cases() -> list[Any]:
    """Every kind of logits with every top-k; by default the interpreter takes two kinds for each top-k, and two of the
    numbers for each kind.
    """
    kinds, numbers = ("random", "many ties", "all equal", "peaked", "mostly -inf"), (1, 2, 20, 63, MAX_TOP_K)
    return [
        (kind, top_k) if (j - i) % len(numbers) in (0, 2) else slow_in_interpreter(kind, top_k)
        for (i, kind), (j, top_k) in itertools.product(enumerate(kinds), enumerate(numbers))
    ]


@pytest.mark.parametrize(("kind", "top_k"), truncated_cases())
def test_truncated(device: torch.device, kind: str, top_k: int) -> None:
    logits = random_logits(24)
    if kind == "many ties":
        logits = logits.round()
    elif kind == "all equal":
        logits = torch.full_like(logits, -1.5)
    elif kind == "peaked":
        logits[:, 1234] += 30
    elif kind == "mostly -inf":
        logits[torch.rand_like(logits) < 0.999] = -torch.inf
        logits[:, -1] = 0
    case = Case(logits, device, seed=top_k)
    case.options["top_k"][:] = top_k
    case.options["top_p"][::2] = 0.7
    case.options["min_p"][::3] = 0.1
    case.options["temperature"][::5] = 0
    assert_almost_all_equal(case.sample(is_truncated=True), case.reference())


def test_rows_with_and_without_top_k_together(device: torch.device) -> None:
    case = Case(random_logits(32), device)
    case.options["top_k"][::2] = 20
    case.options["top_p"][::2] = 0.95
    assert_almost_all_equal(case.sample(is_truncated=True), case.reference())


def test_a_vocabulary_smaller_than_top_k(device: torch.device) -> None:
    case = Case(random_logits(32, 30), device)
    case.options["top_k"][:] = 50
    assert_almost_all_equal(case.sample(is_truncated=True), case.reference())


@pytest.mark.parametrize("is_truncated", [False, True])
def test_bad_rows_and_padding_rows(device: torch.device, is_truncated: bool) -> None:
    logits = random_logits(6)
    logits[0, 4999] = torch.nan
    logits[1] = -torch.inf
    logits[2, 17] = torch.inf
    case = Case(logits, device)
    case.options["top_k"][:] = 20 if is_truncated else 0
    assert case.sample(is_truncated=is_truncated)[:3].tolist() == [-1, -1, -1]
    assert (case.sample(is_truncated=is_truncated)[3:] >= 0).all()
    case.rows[4] = -1
    kernels = SamplingKernels(6, VOCAB, device)
    out = torch.full((6,), -7, dtype=torch.int32, device=device)
    kernels(case.logits, case.rows, case.context_lens, case.options, out.clone(), out, is_truncated=is_truncated)
    assert out[4] == -7


@pytest.mark.parametrize("num_rows", [slow_in_interpreter(4000 if ON_GPU else 800)])
def test_frequencies_are_those_of_the_softmax(device: torch.device, num_rows: int) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -30.0]).repeat(num_rows, 1)
    case = Case(logits, device)
    counts = case.sample(is_truncated=False).cpu().bincount(minlength=6).double() / num_rows
    expected = (logits[0].double() / 0.8).softmax(-1)
    deviation = (expected * (1 - expected) / num_rows).sqrt()
    assert ((counts - expected).abs() <= 5 * deviation + 1e-9).all()
