"""Everything after the LM head, on a device, against the plain reference: mixtures of all that rows may ask."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import Grammar, SamplingLists
from tandem_shared.step_plan import NewRow
from tandem_worker.kernels.best_tokens import FORBIDDEN
from tandem_worker.layers.parallel import VocabParallelEmbedding
from tandem_worker.ranks.shard import Shard
from tandem_worker.runners.cuda.selections import SAMPLED, Selection, StepSampling
from tandem_worker.runners.cuda.token_sampler import TokenSampler
from tandem_worker.runners.logits_stage import adjust
from tandem_worker.runners.logprobs import pack_logprobs
from tandem_worker.runners.row_options import RowOptions
from tandem_worker.runners.sampler import sample
from tests.kernels.comparison import ON_GPU, slow_in_interpreter

# The interpreter's numpy warns of -inf - -inf, which the kernels allow for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NUM_ROWS = 12
NUM_STEPS = 40 if ON_GPU else 3


def make_state(vocab_size: int, shard: Shard, device: torch.device) -> Any:
    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    logits = zeros(NUM_ROWS, vocab_size, dtype=torch.bfloat16)
    is_sharded = shard.size > 1
    local = zeros(NUM_ROWS, shard.vocab_share(vocab_size), dtype=torch.bfloat16) if is_sharded else logits
    return SimpleNamespace(
        logits=logits, local_logits=local, is_sharded=is_sharded, adjusted_logits=local.float(),
        all_adjusted_logits=logits.float(), sampling_rows=zeros(NUM_ROWS), context_lens=zeros(NUM_ROWS),
        last_tokens=zeros(NUM_ROWS), sampled=zeros(NUM_ROWS),
    )  # fmt: skip


def random_row(row: int, rng: np.random.Generator, vocab_size: int) -> NewRow:
    """About every other field is used. Few tokens are in use, so that penalties and bad words often apply."""

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, min(vocab_size, 40), count).tolist())

    def maybe(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.5 else default

    sampling = RowSampling(
        temperature=float(rng.choice([0.0, 0.7, 1.3])),
        top_k=int(rng.choice([0, 0, 5, 64, 100])),
        top_p=maybe(0.8, 1.0),
        min_p=maybe(0.05, 0.0),
        presence_penalty=maybe(1.5, 0.0),
        frequency_penalty=maybe(-0.5, 0.0),
        repetition_penalty=maybe(1.7, 1.0),
        min_tokens=maybe(8, 0),
        seed=int(rng.integers(0, 2**62)),
        choice_index=row % 3,
        num_logprobs=maybe(int(rng.integers(0, 21)), None),
    )
    words = tuple(ids(length) for length in (1, 2, 2, 2, 3, 32))
    bias_ids = sorted(set(ids(20)))
    lists = SamplingLists(
        stop_token_ids=maybe(ids(3), ()),
        logit_bias=maybe(tuple((token, float(rng.normal() * 4)) for token in bias_ids), ()),
        allowed_token_ids=maybe(tuple(set(ids(30))), ()),
        bad_words=maybe(words, ()),
        logprob_token_ids=maybe(ids(4), ()),
        grammar=maybe(Grammar("x"), None),
    )
    if rng.random() < 0.3:
        lists = SamplingLists()
        sampling = replace(sampling, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0)
    tokens = rng.integers(0, min(vocab_size, 40), int(rng.integers(1, 60))).astype(np.int32)
    return NewRow(
        row, row, tokens, int(rng.integers(1, len(tokens) + 1)), 0, 0, np.array([1], np.int32), sampling, lists
    )


class Exchange:
    """What the ranks of a group give each other, one rank after the other: first each gives its shares, and gets a
    likeness of what it asks for; then each runs again, and gets it.
    """

    def __init__(self, num_ranks: int) -> None:
        self.shares: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]
        self.calls: Iterator[int] | None = None

    def all_gather(self, rank: int, share: torch.Tensor) -> torch.Tensor:
        if self.calls is None:
            self.shares[rank].append(share.clone())
            return torch.stack([share] * len(self.shares))
        number = next(self.calls)
        return torch.stack([shares[number] for shares in self.shares])


class Simulation:
    """Rows that decode from random logits, and now and then give their place to a new one."""

    def __init__(self, vocab_size: int, shard: Shard, device: torch.device, exchange: Exchange | None = None) -> None:
        self.exchange = exchange or Exchange(1)
        self.vocab_size, self.shard, self.device = vocab_size, shard, device
        self.rng = np.random.default_rng(0)
        self.state = make_state(vocab_size, shard, device)
        self.options = RowOptions(NUM_ROWS, device)
        self.sampler = TokenSampler(self.model(), self.state, self.options)
        self.rows: dict[int, NewRow] = {}
        self.tokens: dict[int, list[int]] = {}
        self.num_equal = self.num_compared = 0

    def model(self) -> Any:
        def all_gather(share: torch.Tensor) -> torch.Tensor:
            return self.exchange.all_gather(self.shard.rank, share) if self.shard.size > 1 else share[None]

        communicator: Any = SimpleNamespace(shard=self.shard, all_gather=all_gather)
        with self.device:
            head = VocabParallelEmbedding(self.vocab_size, 1, torch.bfloat16, communicator)
        return SimpleNamespace(communicator=communicator, lm_head=head)

    def add(self, numbers: list[int]) -> None:
        new_rows = [random_row(number, self.rng, self.vocab_size) for number in numbers]
        for new in new_rows:
            self.rows[new.row], self.tokens[new.row] = new, new.token_ids.tolist()
        self.options.set(new_rows)
        self.sampler.add(new_rows)

    def begin_step(self, sampling_rows: np.ndarray) -> None:
        """The step's input and its logits."""
        state = self.state
        state.sampling_rows.fill_(-1)
        state.sampling_rows[: len(sampling_rows)] = torch.from_numpy(sampling_rows)
        for row, tokens in self.tokens.items():
            state.context_lens[row] = len(tokens)
            state.last_tokens[row] = tokens[-1]
        logits = torch.from_numpy(self.rng.normal(size=(NUM_ROWS, self.vocab_size)) * 2)
        logits[:, :40] += 3
        self.all_logits = logits.bfloat16().to(self.device)
        part = self.shard.vocab_part(self.vocab_size)
        state.local_logits[:, : part.stop - part.start] = self.all_logits[:, part]

    def set_masks(self, sampling_rows: np.ndarray) -> dict[int, torch.Tensor]:
        """The mask of each row that has a grammar."""
        rows = [row for row in sampling_rows.tolist() if self.rows[row].lists.grammar]
        allowed = self.rng.random((len(rows), self.vocab_size)) < 0.5
        words = np.zeros((len(rows), -(-self.vocab_size // 32) * 32), np.uint8)
        words[:, : self.vocab_size] = allowed
        if rows:
            self.sampler.set_masks(np.array(rows), np.packbits(words, 1, bitorder="little").view(np.int32))
        return dict(zip(rows, torch.from_numpy(allowed), strict=True))

    def expected_logits(self, place: int, row: int, masks: dict[int, torch.Tensor]) -> torch.Tensor:
        new = self.rows[row]
        output = self.tokens[row][new.num_prompt_tokens :]
        logits = self.all_logits[place].float().cpu()
        prompt = self.tokens[row][: new.num_prompt_tokens]
        return adjust(logits, new.sampling, new.lists, prompt, output, masks.get(row))

    def reference(self, rows: np.ndarray, masks: dict[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits that the rows are sampled from, and the tokens."""
        logits = torch.stack([self.expected_logits(i, row, masks) for i, row in enumerate(rows.tolist())])
        where = torch.from_numpy(rows).long().to(self.device)
        options = self.options.of(where, self.state.context_lens[where].long())
        tokens = sample(logits.to(self.device), options, any_random=True, any_truncated=True)
        tokens[logits.to(self.device).amax(-1) == -torch.inf] = -3
        return logits, tokens

    def sample(self, chosen: StepSampling) -> list[int]:
        """What follows the logits stage. Returns the tokens."""
        self.state.sampled.fill_(-7)
        for selection in SAMPLED:
            if chosen.counts[selection]:
                self.sampler.sample(selection, padded(chosen.counts[selection]))
        if chosen.counts[Selection.REPORTED]:
            self.sampler.report(padded(chosen.counts[Selection.REPORTED]))
        return self.state.sampled.tolist()


def padded(count: int) -> int:
    return min(NUM_ROWS, 1 << (count - 1).bit_length())


@pytest.mark.parametrize("vocab_size", [300, slow_in_interpreter(5003), *([151_936] if ON_GPU else [])])
def test_tokens_and_reports(device: torch.device, vocab_size: int) -> None:
    simulation = Simulation(vocab_size, Shard(), device)
    sampler, state = simulation.sampler, simulation.state
    simulation.add(list(range(NUM_ROWS)))
    seen: set[int] = set()
    for step in range(NUM_STEPS):
        replaced = [] if step % 2 == 0 else simulation.rng.choice(NUM_ROWS, 3, replace=False).tolist()
        simulation.add(replaced)
        # Rows that do not sample in this step are in the midst of their prompts: they go on as if newly added.
        rows = np.arange(NUM_ROWS, dtype=np.int32)
        if step == 1:
            rows = np.setdiff1d(rows, replaced[:2]).astype(np.int32)
        simulation.begin_step(rows)
        chosen = sampler.select(rows, has_new_rows=bool(replaced) or step == 0)
        masks = simulation.set_masks(rows)
        if chosen.counts[Selection.ADJUSTED]:
            sampler.adjust(padded(chosen.counts[Selection.ADJUSTED]))
        seen |= {selection for selection in SAMPLED if chosen.counts[selection]}
        sampled = simulation.sample(chosen)
        expected, tokens = simulation.reference(rows, masks)
        simulation.num_compared += len(rows)
        for place, (row, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
            simulation.num_equal += sampled[place] == token
            simulation.tokens[row].append(max(sampled[place], 0))
            assert sampled[place] == -3 or expected[place, sampled[place]] > -torch.inf
            if simulation.options.adjusts[row]:
                adjusted = state.adjusted_logits[place].cpu()
                adjusted = adjusted.masked_fill(adjusted == FORBIDDEN.value, -torch.inf)
                torch.testing.assert_close(adjusted, expected[place], rtol=1e-5, atol=1e-5)
        assert set(sampled[len(rows) :]) <= {-7}
        check_reports(simulation, rows, sampled, sampler.queue_reports(chosen))
    assert simulation.num_equal >= simulation.num_compared - 1
    assert len(seen) == 6 or not ON_GPU


def check_reports(simulation: Simulation, rows: np.ndarray, sampled: list[int], queued: Any) -> None:
    if simulation.device.type == "cuda":
        torch.cuda.synchronize()
    reports = {report.row: report for report in queued.read(sampled)} if queued else {}
    for place, row in enumerate(rows.tolist()):
        new = simulation.rows[row]
        num_top, requested = new.sampling.num_logprobs, list(new.lists.logprob_token_ids)
        assert (row in reports) == (sampled[place] >= 0 and (num_top is not None or bool(requested)))
        if row not in reports:
            continue
        logits = simulation.all_logits[place : place + 1].double()
        tokens = torch.tensor([sampled[place]], device=logits.device)
        wanted = torch.tensor([requested], dtype=torch.int64, device=logits.device)
        packed = pack_logprobs(logits, tokens, num_top or 0, wanted)[0].cpu()
        report, num_top = reports[row], num_top or 0
        assert [report.rank, *report.top_token_ids] == packed[: 1 + num_top].tolist()
        logprobs = [report.logprob, *report.top_logprobs, *report.requested_logprobs]
        torch.testing.assert_close(
            torch.tensor(logprobs), packed[1 + num_top :].view(torch.float32), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("num_steps", [1, slow_in_interpreter(3)])
def test_ranks_sample_the_tokens_of_one(device: torch.device, num_steps: int) -> None:
    vocab_size, num_ranks = 300, 2
    exchange = Exchange(num_ranks)
    ranks = [Simulation(vocab_size, Shard(rank, num_ranks), device, exchange) for rank in range(num_ranks)]
    rows = np.arange(NUM_ROWS, dtype=np.int32)
    num_equal = 0
    for step in range(num_steps):
        chosen: list[StepSampling] = []
        for simulation in ranks:
            simulation.add(rows.tolist() if step == 0 else [step])
            simulation.begin_step(rows)
            chosen.append(simulation.sampler.select(rows, has_new_rows=True))
            masks = simulation.set_masks(rows)
            simulation.sampler.adjust(padded(chosen[-1].counts[Selection.ADJUSTED]))
        exchange.calls, exchange.shares = None, [[] for _ in ranks]
        for simulation, its_choice in zip(ranks, chosen, strict=True):
            simulation.sample(its_choice)
        for simulation, its_choice in zip(ranks, chosen, strict=True):
            exchange.calls = itertools.count()
            sampled = simulation.sample(its_choice)
            _, tokens = simulation.reference(rows, masks)
            num_equal += sum(np.array(sampled) == tokens.cpu().numpy())
            check_reports(simulation, rows, sampled, simulation.sampler.queue_reports(its_choice))
            for row, token in enumerate(sampled):
                simulation.tokens[row].append(max(token, 0))
    assert num_equal >= num_steps * num_ranks * NUM_ROWS - num_ranks


def test_adjusted_logits_of_a_shard(device: torch.device) -> None:
    """Each rank adjusts its own part of the vocabulary, by all of the row's tokens."""
    vocab_size = 90
    parts = []
    for rank in range(3):
        simulation = Simulation(vocab_size, Shard(rank, 3), device)
        simulation.add(list(range(NUM_ROWS)))
        rows = np.arange(NUM_ROWS, dtype=np.int32)
        for step in range(2):
            simulation.begin_step(rows)
            chosen = simulation.sampler.select(rows, has_new_rows=step == 0)
            masks = simulation.set_masks(rows)
            simulation.sampler.adjust(padded(chosen.counts[Selection.ADJUSTED]))
            expected = [simulation.expected_logits(place, place, masks) for place in range(NUM_ROWS)]
            for row in range(NUM_ROWS):
                simulation.tokens[row].append(7 * (row + step))
        part = simulation.shard.vocab_part(vocab_size)
        parts.append(simulation.state.adjusted_logits[:, : part.stop - part.start])
    adjusted = torch.cat(parts, 1).cpu()
    adjusts = simulation.options.adjusts
    assert adjusts.sum() > 5
    torch.testing.assert_close(
        adjusted.masked_fill(adjusted == FORBIDDEN.value, -torch.inf)[adjusts], torch.stack(expected)[adjusts],
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
