"""The reference of the logits stage against transformers' processors in float64, and numpy where they have none."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_shared.sampling_fields import FLOAT32_MAX, RowSampling
from tandem_shared.sampling_lists import NO_LISTS, Grammar, SamplingLists
from tandem_shared.step_plan import FAULT_GRAMMAR, NewRow
from tandem_worker.runners.grammar_rows import GrammarRows
from tandem_worker.runners.logits_stage import GrammarMasks, LogitsStage, adjust, allowed_tokens
from tandem_worker.runners.sampler import SamplingRows, sample
from tests.support.transformers_sampling import adjusting_processors

VOCAB = 40
NO_GRAMMARS = GrammarRows(None, VOCAB, ())
IDS = st.integers(0, VOCAB - 1)
# Penalties and biases are float32 on the wire; these are float32 numbers.
PENALTIES = st.integers(-16, 16).map(lambda number: number / 8)
SAMPLINGS = st.builds(
    RowSampling,
    temperature=st.just(1.0),
    presence_penalty=PENALTIES,
    frequency_penalty=PENALTIES,
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.25, 3.0]),
    min_tokens=st.integers(0, 12),
)
LISTS = st.builds(
    SamplingLists,
    stop_token_ids=st.lists(IDS, max_size=3).map(tuple),
    logit_bias=st.dictionaries(IDS, st.integers(-400, 400).map(lambda number: number / 4), max_size=5).map(
        lambda biases: tuple(biases.items())
    ),
    allowed_token_ids=st.just(()) | st.lists(IDS, min_size=1, max_size=VOCAB).map(tuple),
    # Few tokens, so that words are found in the output.
    bad_words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), max_size=5).map(tuple),
)
TOKENS = st.lists(IDS | st.integers(0, 3), max_size=12)


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, shape or (VOCAB,)))


def expected(
    logits: torch.Tensor, sampling: RowSampling, lists: SamplingLists, prompt: Sequence[int], output: Sequence[int]
) -> np.ndarray:
    processors = adjusting_processors(sampling, lists, len(prompt), VOCAB)
    scores: np.ndarray = processors(torch.tensor([[*prompt, *output]]), logits[None])[0].numpy()
    return scores


@settings(max_examples=200, deadline=None)
@given(SAMPLINGS, LISTS, st.lists(IDS, min_size=1, max_size=12), TOKENS, st.integers(0, 2**20))
def test_logits_are_those_of_transformers_and_of_the_formula(
    sampling: RowSampling, lists: SamplingLists, prompt: list[int], output: list[int], seed: int
) -> None:
    logits = random_logits(seed)
    found = adjust(logits, sampling, lists, prompt, output)
    assert found.tolist() == expected(logits, sampling, lists, prompt, output).tolist()
    assert torch.equal(logits, random_logits(seed))


@pytest.mark.parametrize(
    ("lists", "min_tokens", "output", "impossible"),
    [
        (SamplingLists(bad_words=((7,),)), 0, [], [7]),
        (SamplingLists(bad_words=((1, 2, 3),)), 0, [1, 2], [3]),
        (SamplingLists(bad_words=((1, 2, 3),)), 0, [2], []),
        (SamplingLists(bad_words=((1, 2, 3),)), 0, [1, 2, 1], []),
        # The prompt, which ends with 5, does not count.
        (SamplingLists(bad_words=((5, 6), (5, 1, 4))), 0, [1], []),
        (SamplingLists(stop_token_ids=(8, 9)), 2, [0], [8, 9]),
        (SamplingLists(stop_token_ids=(8, 9)), 2, [0, 0], []),
        (SamplingLists(allowed_token_ids=tuple(range(1, VOCAB))), 0, [], [0]),
        # The masks of grammars heed min_tokens themselves.
        (SamplingLists(stop_token_ids=(8,), grammar=Grammar("")), 2, [], []),
    ],
)
def test_what_is_impossible(lists: SamplingLists, min_tokens: int, output: list[int], impossible: list[int]) -> None:
    found = adjust(random_logits(0), RowSampling(min_tokens=min_tokens), lists, [5], output)
    assert (found == -torch.inf).nonzero()[:, 0].tolist() == impossible


def test_a_bias_does_not_make_an_impossible_token_possible() -> None:
    lists = SamplingLists(logit_bias=((3, 100.0),), bad_words=((3,),))
    assert adjust(random_logits(0), RowSampling(), lists, [1], [])[3] == -torch.inf


def test_numbers_are_those_of_the_wire() -> None:
    logits = torch.full((VOCAB,), 2.0, dtype=torch.float64)
    sampling = RowSampling(repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.2)
    found = adjust(logits, sampling, SamplingLists(logit_bias=((1, 0.3),)), [1], [2, 2])
    wide = [float(np.float32(number)) for number in (1.1, 0.1, 0.2, 0.3)]
    assert float(found[1]) == (2 + wide[3]) / wide[0]
    assert float(found[2]) == 2 / wide[0] - 2 * wide[1] - wide[2]


@pytest.mark.parametrize("penalty", [2.0**-149, FLOAT32_MAX])
def test_the_largest_penalties_leave_possible_tokens_possible(penalty: float) -> None:
    logits = random_logits(0).float()
    found = adjust(logits, RowSampling(repetition_penalty=penalty), NO_LISTS, range(VOCAB), [])
    assert found.isfinite().all()
    assert ((found > 0) == (logits > 0)).all()


def new_row(row: int, token_ids: Sequence[int], num_prompt: int, sampling: RowSampling, lists: SamplingLists) -> NewRow:
    ids = np.array(token_ids, np.int32)
    return NewRow(row, row, ids, num_prompt, 0, 0, np.ones(1, np.int32), sampling, lists)


ROWS = st.lists(st.tuples(st.just(RowSampling()) | SAMPLINGS, st.just(NO_LISTS) | LISTS), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(ROWS, st.data())
def test_a_row_s_logits_follow_from_its_own_tokens(
    rows: list[tuple[RowSampling, SamplingLists]], data: st.DataObject
) -> None:
    """Rows are added, sample, and are sometimes preempted and come back with their tokens, in another place."""
    stage, tokens, places = LogitsStage(VOCAB, NO_GRAMMARS), {}, {}
    for number in range(len(rows)):
        tokens[number] = [number, 1, 2]
    for step in range(6):
        added = []
        for number, (sampling, lists) in enumerate(rows):
            if number not in places or data.draw(st.integers(0, 3)) == 0:
                free = sorted(set(range(12)) - set(places.values()))
                places[number] = data.draw(st.sampled_from(free))
                added.append(new_row(places[number], tokens[number], 3, sampling, lists))
        stage.add(added)
        numbers = sorted(places, key=places.__getitem__)
        batch = np.array([places[number] for number in numbers], np.int32)
        logits = random_logits(step, len(rows), VOCAB)
        before = logits.clone()
        adjusted, fault_codes = stage.adjust(batch, logits)
        assert torch.equal(logits, before) and not fault_codes
        for number, found, own in zip(numbers, adjusted, logits, strict=True):
            prompt, output = tokens[number][:3], tokens[number][3:]
            assert found.tolist() == expected(own, *rows[number], prompt, output).tolist()
        sampled = np.array([data.draw(st.integers(0, 3)) for _ in numbers])
        stage.accept(batch, torch.from_numpy(sampled))
        for number, token_id in zip(numbers, sampled.tolist(), strict=True):
            tokens[number].append(token_id)


def test_nothing_is_copied_if_no_row_asks() -> None:
    stage = LogitsStage(VOCAB, NO_GRAMMARS)
    stage.add([new_row(2, [1], 1, RowSampling(presence_penalty=1.0), NO_LISTS)])
    stage.add([new_row(0, [1], 1, RowSampling(top_k=3), NO_LISTS), new_row(2, [1], 1, RowSampling(), NO_LISTS)])
    logits = random_logits(0, 2, VOCAB)
    assert stage.adjust(np.array([0, 2], np.int32), logits)[0] is logits


GRAMMAR = SamplingLists(grammar=Grammar("x"))


class FakeGrammars:
    """Allows each row with a grammar the token after its last one. Row 3's grammar has not started; row 5's fails."""

    def __init__(self) -> None:
        self.last: dict[int, int] = {}

    def add(self, new_rows: Sequence[NewRow]) -> None:
        self.last |= {new.row: int(new.token_ids[-1]) for new in new_rows if new.lists.grammar}

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        self.last |= {row: token_id for row, token_id in zip(rows, token_ids, strict=True) if row in self.last}

    def masks(self, rows: np.ndarray) -> GrammarMasks:
        active = np.array([row for row in rows.tolist() if row != 3], np.int32)
        bits = np.zeros((len(active), 2), np.uint32)
        for line, row in zip(bits, active.tolist(), strict=True):
            token_id = self.last[row] + 1
            line[token_id // 32] = 0 if row == 5 else 1 << token_id % 32
        return GrammarMasks(active, bits.view(np.int32), {5: FAULT_GRAMMAR} if 5 in active else {})


def test_grammars_allow_what_their_masks_say() -> None:
    stage = LogitsStage(VOCAB, FakeGrammars())
    stage.add([new_row(row, [30], 1, RowSampling(), GRAMMAR) for row in (1, 3, 5)])
    stage.add([new_row(0, [1], 1, RowSampling(), NO_LISTS)])
    rows, logits = np.array([0, 1, 3, 5], np.int32), random_logits(0, 4, VOCAB)
    for token_id in (31, 32):
        adjusted, fault_codes = stage.adjust(rows, logits)
        assert torch.equal(adjusted[[0, 2]], logits[[0, 2]])
        assert adjusted[1].isfinite().nonzero()[:, 0].tolist() == [token_id]
        assert not adjusted[3].isfinite().any() and fault_codes == {5: FAULT_GRAMMAR}
        stage.accept(rows, torch.tensor([7, token_id, 9, -3]))


def test_a_row_whose_grammar_nobody_can_read_is_not_opened() -> None:
    stage = LogitsStage(VOCAB, NO_GRAMMARS)
    stage.add([new_row(1, [1], 1, RowSampling(), GRAMMAR)])
    adjusted, fault_codes = stage.adjust(np.array([1], np.int32), random_logits(0, 1, VOCAB))
    assert not adjusted.isfinite().any() and fault_codes == {1: FAULT_GRAMMAR}


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100])
def test_masks_are_read_bit_by_bit(vocab_size: int) -> None:
    is_allowed = np.random.default_rng(vocab_size).random((3, vocab_size)) < 0.5
    bits = np.zeros((3, -(-vocab_size // 32)), np.uint32)
    for row, token_id in np.argwhere(is_allowed).tolist():
        bits[row, token_id // 32] |= np.uint32(1 << token_id % 32)
    assert allowed_tokens(bits.view(np.int32), vocab_size).tolist() == is_allowed.tolist()


@pytest.mark.parametrize(
    ("sampling", "lists"),
    [
        (RowSampling(0.8, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25), NO_LISTS),
        (RowSampling(1.3, top_p=0.9, frequency_penalty=-0.5), SamplingLists(logit_bias=((3, 2.0), (4, -1.5)))),
        (RowSampling(1.0, top_k=9, min_p=0.02, min_tokens=9), SamplingLists((1, 2), bad_words=((3,), (7, 6)))),
        (RowSampling(1.2, top_p=0.95, presence_penalty=1), SamplingLists(allowed_token_ids=tuple(range(0, 40, 3)))),
    ],
    ids=["penalties", "bias_top_p", "words_top_k_min_p", "allowed_top_p"],
)
def test_draws_follow_the_changed_and_truncated_distribution(sampling: RowSampling, lists: SamplingLists) -> None:
    """A chi-squared test on 100,000 draws from one row's logits."""
    count, prompt, output = 100_000, [5, 6, 7], [6, 3, 3, 9, 7]
    logits = random_logits(8) / 2
    adjusted = adjust(logits, sampling, lists, prompt, output)
    options = SamplingRows(
        **{
            name: torch.full((count,), value)
            for name, value in (
                ("temperature", sampling.temperature), ("top_k", sampling.top_k), ("top_p", sampling.top_p),
                ("min_p", sampling.min_p), ("seed", 7), ("choice_index", 0),
            )
        },
        position=torch.arange(count),
    )  # fmt: skip
    drawn = sample(adjusted.expand(count, -1), options, any_random=True, any_truncated=True)
    observed = np.bincount(drawn.numpy(), minlength=VOCAB)
    probabilities = kept_probabilities(expected(logits, sampling, lists, prompt, output), sampling) * count
    assert observed[probabilities == 0].sum() == 0
    likely = probabilities >= 5
    chi_square = ((observed - probabilities)[likely] ** 2 / probabilities[likely]).sum()
    degrees = likely.sum() - 1
    # Five standard deviations above the mean.
    assert degrees >= 4 and chi_square < degrees + 5 * np.sqrt(2 * degrees)


def kept_probabilities(logits: np.ndarray, sampling: RowSampling) -> np.ndarray:
    """The distribution after temperature, top-k, top-p and min-p, by sorting."""
    scaled = logits / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: sampling.top_k] if sampling.top_k else order
    weights = np.exp(scaled[kept] - scaled[kept[0]])
    weights /= weights.sum()
    keep = (np.cumsum(weights) - weights < sampling.top_p) & (weights >= sampling.min_p * weights[0])
    result = np.zeros(len(logits))
    result[kept[keep]] = weights[keep] / weights[keep].sum()
    return result
