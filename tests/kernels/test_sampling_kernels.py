"""The sampling kernels against tandem_worker/runners/sampler.py, the plain reference."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tandem_worker.kernels.best_tokens import FORBIDDEN, BatchTensors
from tandem_worker.kernels.sampling import SamplingKernels
from tandem_worker.kernels.top_k import MAX_TOP_K
from tandem_worker.ranks.shard import Shard
from tandem_worker.runners.sampler import SamplingRows, sample, truncate
from tests.kernels.comparison import ON_GPU, slow_in_interpreter

VOCAB = 5000
KINDS = ("plain", "top_k", "threshold")
# The interpreter's numpy warns of -inf - -inf, which the kernels allow for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Case:
    """Rows of one batch, with what both samplers are given."""

    def __init__(
        self, logits: torch.Tensor, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_rows, self.device = len(logits), device
        self.logits = logits.to(device, dtype)

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

    def sample(self, kind: str = "plain", *, is_compact: bool = False) -> torch.Tensor:
        """Tokens in the order of rows; logits' row i belongs to the i-th of rows, whose slots are in another order."""
        kernels = SamplingKernels(self.num_rows, self.logits.shape[1], self.device)
        batch = self.batch()
        indices = torch.arange(self.num_rows, dtype=torch.int32, device=self.device).flip(0).contiguous()
        logits = self.logits[indices.long()] if is_compact else self.logits
        getattr(kernels, f"sample_{kind}")(logits, indices, batch, is_compact=is_compact)
        rows = self.rows.long()
        assert torch.equal(batch.last_tokens[rows[rows >= 0]], batch.out[rows >= 0].clamp(min=0))
        return batch.out.long()

    def batch(self) -> BatchTensors:
        last, out = (torch.full((self.num_rows,), -7, dtype=torch.int32, device=self.device) for _ in range(2))
        return BatchTensors(self.rows, self.context_lens, self.options, last, out)

    def reference(self) -> torch.Tensor:
        rows = self.rows.long()
        o = {name: values[rows] for name, values in self.options.items()}
        options = SamplingRows(
            o["temperature"], o["top_k"].long(), o["top_p"], o["min_p"], o["seed"], o["choice_index"].long(),
            self.context_lens[rows].long(),
        )  # fmt: skip
        logits = self.logits.float()
        logits = logits.masked_fill(logits == FORBIDDEN.value, -torch.inf)
        return sample(logits, options, any_random=True, any_truncated=True)


def random_logits(num_rows: int, vocab_size: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size) * scale


def logits_of_kind(kind: str, num_rows: int, vocab_size: int = VOCAB) -> torch.Tensor:
    logits = random_logits(num_rows, vocab_size)
    if kind == "many ties":
        logits = logits.round()
    elif kind == "all equal":
        logits = torch.full_like(logits, -1.5)
    elif kind == "peaked":
        logits[:, 1234] += 30
    elif kind == "mostly -inf":
        logits[torch.rand_like(logits) < 0.999] = -torch.inf
        logits[:, -1] = 0
    return logits


def assert_almost_all_equal(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Noise in float32 and in float64 may order two nearly equal scores differently, rarely."""
    assert (out == expected).double().mean() > 0.99


@pytest.mark.parametrize("vocab_size", [5000, 2048, 70, 4097])
def test_greedy_and_temperature(device: torch.device, vocab_size: int) -> None:
    case = Case(random_logits(64, vocab_size), device)
    case.options["temperature"][::3] = 0
    out = case.sample()
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
        batch = case.batch()
        kernels.sample_plain(local, torch.arange(case.num_rows, dtype=torch.int32, device=device), batch)
        return batch.out.long()

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
    assert case.sample().tolist() == [33, 0]
    case.options["temperature"][:] = 1e-6
    case.options["top_k"][:] = 1
    assert case.sample("top_k").tolist() == [33, 0]


@pytest.mark.parametrize("temperature", [1e-39, 1e-30])
@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_temperatures_are_greedy(device: torch.device, kind: str, temperature: float) -> None:
    case = Case(random_logits(4), device)
    case.options["temperature"][:] = temperature
    case.options["top_k"][:] = 20 if kind == "top_k" else 0
    case.options["top_p"][:] = 0.9 if kind == "threshold" else 1
    out = case.sample(kind)
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
    case = Case(logits_of_kind(kind, 24), device, seed=top_k)
    case.options["top_k"][:] = top_k
    case.options["top_p"][::2] = 0.7
    case.options["min_p"][::3] = 0.1
    case.options["temperature"][::5] = 0
    assert_almost_all_equal(case.sample("top_k"), case.reference())


@pytest.mark.parametrize("kind", [*(slow_in_interpreter(kind) for kind in KINDS[:2]), "threshold"])
@pytest.mark.parametrize("is_compact", [slow_in_interpreter(False), True])
def test_adjusted_logits(device: torch.device, kind: str, is_compact: bool) -> None:
    """In float32, and with forbidden tokens; some rows have few tokens left."""
    logits = random_logits(12)
    logits[torch.rand_like(logits) < 0.5] = FORBIDDEN.value
    logits[3] = FORBIDDEN.value
    logits[3, [4, 4000, 2500]] = torch.tensor([0.3, 0.1, 0.2])
    logits[4] = FORBIDDEN.value
    logits[4, -1] = 1.0
    # -0 and 0 are equal.
    logits[5] = FORBIDDEN.value
    logits[5, [7, 3000, 4000]] = torch.tensor([-0.0, 0.0, -0.0])
    case = Case(logits, device, dtype=torch.float32)
    if kind != "plain":
        case.options["top_k"][:] = 20 if kind == "top_k" else 0
        case.options["top_p"][:] = 0.8
        case.options["min_p"][::3] = 0.05
    if kind == "threshold":
        case.options["top_k"][::2] = 500
        case.options["top_k"][[3, 4]] = 2
    # Were forbidden tokens only unlikely, this temperature would make them likely.
    case.options["temperature"][6:9] = 3e38
    case.options["top_p"][6:9] = 1
    assert_almost_all_equal(case.sample(kind, is_compact=is_compact), case.reference())


def threshold_cases() -> list[Any]:
    """Every kind of logits with every mixture; by default the interpreter takes one mixture for each kind."""
    kinds = ("random", "many ties", "all equal", "peaked", "mostly -inf")
    mixtures = ("top-p", "min-p", "large top-k", "all")
    return [
        (kind, mixture) if j == (i + i // 4) % 4 else slow_in_interpreter(kind, mixture)
        for (i, kind), (j, mixture) in itertools.product(enumerate(kinds), enumerate(mixtures))
    ]


@pytest.mark.parametrize(("kind", "mixture"), threshold_cases())
def test_threshold(device: torch.device, kind: str, mixture: str) -> None:
    count = 10 if ON_GPU else 6
    case = Case(logits_of_kind(kind, count, 2100), device, seed=3)
    if mixture in ("top-p", "all"):
        case.options["top_p"][:] = torch.linspace(0.05, 0.999, count)
    if mixture in ("min-p", "all"):
        case.options["min_p"][::2] = torch.linspace(0.001, 1, count // 2).to(device)
    if mixture in ("large top-k", "all"):
        case.options["top_k"][:] = torch.tensor([65, 1000, 2100, 2**31 - 1, 2, 0, 100, 2099, 9000, 1][:count])
    assert_almost_all_equal(case.sample("threshold"), case.reference())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_tied", [slow_in_interpreter(False), slow_in_interpreter(True)])
def test_threshold_keeps_what_the_reference_keeps(device: torch.device, dtype: torch.dtype, is_tied: bool) -> None:
    """At a temperature that makes all kept tokens as good as equal, each is drawn before long, and none else ever. The
    interpreter has only the time for the second.
    """
    num_rows = 2000 if ON_GPU else 30
    logits = torch.randn(1, 300).round() if is_tied else torch.randn(1, 300)
    case = Case(logits.repeat(num_rows, 1), device, dtype=dtype)
    case.options["temperature"][:] = 50
    case.options["top_k"][:] = 90
    case.options["top_p"][:] = 0.1
    rows = torch.ones(1)
    kept = truncate(case.logits[:1].double().cpu() / 50, 90 * rows.long(), 0.1 * rows, 0 * rows)[0] > -torch.inf
    assert 5 < kept.sum() < 12
    drawn, possible = set(case.sample("threshold").tolist()), set(kept.nonzero()[:, 0].tolist())
    assert drawn == possible if ON_GPU else drawn <= possible


def test_rows_with_and_without_top_k_together(device: torch.device) -> None:
    case = Case(random_logits(32), device)
    case.options["top_k"][::2] = 20
    case.options["top_p"][::2] = 0.95
    assert_almost_all_equal(case.sample("top_k"), case.reference())


@pytest.mark.skipif(not ON_GPU, reason="takes too long in the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_as_models_have_it(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    case = Case(random_logits(128, 151_936), device, dtype=dtype)
    case.options["top_k"][:] = {"plain": 0, "top_k": 20, "threshold": 0}[kind]
    case.options["top_k"][::4] = {"plain": 0, "top_k": 64, "threshold": 3000}[kind]
    case.options["top_p"][::2] = 1.0 if kind == "plain" else 0.3
    case.options["min_p"][::3] = 0.0 if kind == "plain" else 0.02
    assert (case.sample(kind) == case.reference()).double().mean() > 0.97


def test_a_vocabulary_smaller_than_top_k(device: torch.device) -> None:
    case = Case(random_logits(32, 30), device)
    case.options["top_k"][:] = 50
    assert_almost_all_equal(case.sample("top_k"), case.reference())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("plain", torch.bfloat16),
        ("top_k", torch.float32),
        ("threshold", torch.float32),
        *itertools.starmap(
            slow_in_interpreter,
            [("plain", torch.float32), ("top_k", torch.bfloat16), ("threshold", torch.bfloat16)],
        ),
    ],
)
def test_bad_rows_and_padding(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    logits = random_logits(7)
    logits[0, 4999] = torch.nan
    logits[1] = -torch.inf
    logits[2, 17] = torch.inf
    if dtype == torch.float32:
        logits[3] = FORBIDDEN.value
        logits[3, 5] = -torch.inf
    case = Case(logits, device, dtype=dtype)
    case.options["top_k"][:] = 20 if kind == "top_k" else 0
    case.options["top_p"][:] = 0.9 if kind == "threshold" else 1
    out = case.sample(kind)
    assert out[:3].tolist() == [-1, -1, -1]
    assert (out[4:] >= 0).all()
    assert out[3] == -3 if dtype == torch.float32 else out[3] >= 0
    expected = out.clone()
    case.rows[4], expected[4] = -1, -7
    assert torch.equal(case.sample(kind), expected)
    # Padding slots.
    batch = case.batch()
    indices = torch.tensor([-1, 6, -1], dtype=torch.int32, device=device)
    getattr(SamplingKernels(7, VOCAB, device), f"sample_{kind}")(case.logits, indices, batch)
    assert batch.out.tolist() == [-7] * 6 + [expected[6]]


@pytest.mark.parametrize("num_rows", [slow_in_interpreter(4000 if ON_GPU else 800)])
def test_frequencies_are_those_of_the_softmax(device: torch.device, num_rows: int) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -30.0]).repeat(num_rows, 1)
    case = Case(logits, device)
    counts = case.sample().cpu().bincount(minlength=6).double() / num_rows
    expected = (logits[0].double() / 0.8).softmax(-1)
    deviation = (expected * (1 - expected) / num_rows).sqrt()
    assert ((counts - expected).abs() <= 5 * deviation + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 0.6, 0.0), (0, 1.0, 0.2), (70, 0.9, 0.0), (0, 0.05, 0.0)])
@pytest.mark.skipif(not ON_GPU, reason="takes too long in the interpreter")
def test_threshold_frequencies_are_those_of_the_kept_tokens(
    device: torch.device, dtype: torch.dtype, top_k: int, top_p: float, min_p: float
) -> None:
    """The chi-squared statistic of 120,000 draws. The seeds are fixed, and so is the outcome."""
    num_rows = 60_000
    logits = torch.linspace(0, 4, 90).roll(31).to(dtype).double()
    weights = torch.exp(logits / 0.8)
    order = logits.argsort(descending=True, stable=True)
    rank = order.argsort()
    weights[rank >= (top_k or 90)] = 0
    before = weights[order].cumsum(0)[rank] - weights
    weights[(before >= top_p * weights.sum()) & (rank > 0) | (weights < min_p * weights.max())] = 0
    counts = torch.zeros(90, dtype=torch.int64)
    for seed in range(2):
        case = Case(logits.repeat(num_rows, 1), device, seed=seed, dtype=dtype)
        case.options["top_k"][:], case.options["top_p"][:], case.options["min_p"][:] = top_k, top_p, min_p
        counts += case.sample("threshold").cpu().bincount(minlength=90)
    assert not counts[weights == 0].any()
    expected = (weights / weights.sum() * counts.sum())[weights > 0]
    assert expected.min() > 5
    statistic = ((counts[weights > 0] - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5 + 4
