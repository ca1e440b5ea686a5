"""Which rows each stage is for, against a plain account of what each row asks."""

import numpy as np
import torch

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import SamplingLists
from tandem_shared.step_plan import NewRow
from tandem_worker.runners.cuda.selections import SAMPLED, RowSelections, Selection, StepSampling
from tandem_worker.runners.row_options import RowOptions

NUM_ROWS = 10
BIASED = SamplingLists(logit_bias=((3, 1.0),))
ASKED: list[tuple[RowSampling, SamplingLists, Selection]] = [
    (RowSampling(temperature=0.0, top_p=0.5, top_k=100), SamplingLists(), Selection.PLAIN),
    (RowSampling(), SamplingLists(), Selection.PLAIN),
    (RowSampling(top_k=64, top_p=0.5), SamplingLists(logprob_token_ids=(1,)), Selection.TOP_K),
    (RowSampling(top_k=65), SamplingLists(), Selection.THRESHOLD),
    (RowSampling(top_p=0.9, num_logprobs=0), SamplingLists(), Selection.THRESHOLD),
    (RowSampling(min_p=0.1), BIASED, Selection.ADJUSTED_THRESHOLD),
    (RowSampling(repetition_penalty=1.5, top_k=1), SamplingLists(), Selection.ADJUSTED_TOP_K),
    (RowSampling(presence_penalty=1.5), SamplingLists(), Selection.ADJUSTED_PLAIN),
]


def new_row(row: int, asked: int) -> NewRow:
    sampling, lists, _ = ASKED[asked]
    ids = np.ones(1, np.int32)
    return NewRow(row, row, ids, 1, 0, 0, ids, sampling, lists)


def check(selections: RowSelections, sampling: StepSampling, asked: list[int]) -> None:
    """asked: for each sampling row, what it asks."""
    assert sampling.num_rows == len(asked)
    for selection in Selection:
        expected = [
            place
            for place, number in enumerate(asked)
            if selection is ASKED[number][2]
            or (selection is Selection.ADJUSTED and number >= 5)
            or (selection is Selection.REPORTED and number in (2, 4))
        ]
        assert sampling.counts[selection] == len(expected)
        listed = selections.lists[selection]
        if expected and len(expected) < len(asked):
            assert listed.tolist() == expected + [-1] * (len(listed) - len(expected))
        elif expected:
            assert listed[:NUM_ROWS].tolist() == list(range(NUM_ROWS))
    assert sum(sampling.counts[selection] for selection in SAMPLED) == len(asked)


def test_every_row_is_in_the_selection_of_what_it_asks() -> None:
    rng = np.random.default_rng(0)
    options = RowOptions(NUM_ROWS, torch.device("cpu"))
    selections = RowSelections(NUM_ROWS, options)
    asks = np.zeros(NUM_ROWS, np.int64)
    options.set([new_row(row, 0) for row in range(NUM_ROWS)])
    for step in range(200):
        new = rng.choice(NUM_ROWS, rng.integers(0, 3), replace=False)
        asks[new] = rng.integers(0, len(ASKED) if step % 20 < 15 else 2, len(new))
        options.set([new_row(row, asks[row]) for row in new.tolist()])
        rows = np.sort(rng.choice(NUM_ROWS, rng.integers(1, NUM_ROWS + 1), replace=False)).astype(np.int32)
        before = selections.lists.copy()
        sampling, has_changed = selections.select(rows, has_new_rows=bool(len(new)))
        assert has_changed or np.array_equal(before, selections.lists)
        check(selections, sampling, asks[rows].tolist())


def test_a_batch_that_asks_nothing_copies_nothing_whatever_its_size() -> None:
    options = RowOptions(NUM_ROWS, torch.device("cpu"))
    options.set([new_row(row, row % 2) for row in range(NUM_ROWS)])
    selections = RowSelections(NUM_ROWS, options)
    for count in (1, 5, NUM_ROWS, 3):
        assert not selections.select(np.arange(count, dtype=np.int32), has_new_rows=True)[1]


def test_the_same_rows_are_looked_at_once() -> None:
    options = RowOptions(NUM_ROWS, torch.device("cpu"))
    options.set([new_row(row, row % len(ASKED)) for row in range(NUM_ROWS)])
    selections = RowSelections(NUM_ROWS, options)
    rows = np.arange(NUM_ROWS, dtype=np.int32)
    first, has_changed = selections.select(rows, has_new_rows=True)
    assert has_changed
    again, has_changed = selections.select(rows, has_new_rows=False)
    assert again is first and not has_changed
