"""The batch refuses a plan that it can't follow, whole and with nothing applied."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tandem_shared.errors import InvalidPlan
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists
from tandem_shared.step_plan import NewRow, StepPlan
from tandem_worker.runners.batch import Batch


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def make_batch() -> Batch:
    return Batch(num_rows=4, num_blocks=10, block_size=4, max_model_len=32, max_num_batched_tokens=16, vocab_size=100)


def new_row(row: int = 1, num_tokens: int = 6, **changes: Any) -> NewRow:
    new = NewRow(
        row=row,
        sequence_id=row,
        token_ids=np.arange(num_tokens, dtype=np.int32),
        num_prompt_tokens=num_tokens,
        num_computed_tokens=0,
        num_cached_tokens=0,
        block_ids=ints(3, 4),
        sampling=RowSampling(),
    )
    return replace(new, **changes)


def first_plan(**changes: Any) -> StepPlan:
    return StepPlan(1, added_rows=(new_row(**changes),), chunk_rows=ints(1), chunk_num_tokens=ints(6))


def test_a_row_prefills_then_decodes_until_removed() -> None:
    batch = make_batch()
    work = batch.apply(StepPlan(1, added_rows=(new_row(),), chunk_rows=ints(1), chunk_num_tokens=ints(4)))
    assert (work.chunk_starts.tolist(), work.sampling_rows.tolist()) == ([0], [])
    work = batch.apply(StepPlan(2, chunk_rows=ints(1), chunk_num_tokens=ints(2)))
    assert (work.chunk_starts.tolist(), work.sampling_rows.tolist()) == ([4], [1])
    assert batch.slots(1, 4, 3).tolist() == [16, 17, 18]
    for _ in range(2):
        work = batch.apply(StepPlan(3))
        assert (work.decode_rows.tolist(), work.sampling_rows.tolist()) == ([1], [1])
    with pytest.raises(InvalidPlan, match="no slot for their next token"):
        batch.apply(StepPlan(5))
    batch.apply(StepPlan(5, appended_block_rows=ints(1), appended_block_ids=ints(9)))
    assert batch.slots(1, 8, 1).tolist() == [36]
    work = batch.apply(
        StepPlan(6, removed_rows=ints(1), added_rows=(new_row(0),), chunk_rows=ints(0), chunk_num_tokens=ints(6))
    )
    assert (work.decode_rows.tolist(), work.sampling_rows.tolist()) == ([], [0])


def test_chunks_come_in_the_order_in_which_they_may_read_each_other() -> None:
    """Rows that were there, then new ones as they were added, whatever their numbers are."""
    batch = make_batch()
    batch.apply(StepPlan(1, added_rows=(new_row(2),), chunk_rows=ints(2), chunk_num_tokens=ints(1)))
    added = (new_row(3, block_ids=ints(5, 6)), new_row(0, block_ids=ints(3, 7)))
    work = batch.apply(StepPlan(2, added_rows=added, chunk_rows=ints(0, 2, 3), chunk_num_tokens=ints(6, 3, 4)))
    assert work.chunk_rows.tolist() == [2, 3, 0]
    assert (work.chunk_starts.tolist(), work.chunk_counts.tolist()) == ([1, 0, 0], [3, 4, 6])
    assert work.sampling_rows.tolist() == [0]


def test_shared_positions_are_not_written() -> None:
    batch = make_batch()
    full_hit = new_row(num_tokens=8, num_computed_tokens=7, num_cached_tokens=8)
    work = batch.apply(StepPlan(1, added_rows=(full_hit,), chunk_rows=ints(1), chunk_num_tokens=ints(1)))
    assert work.sampling_rows.tolist() == [1]
    assert batch.slots(1, 7, 1).tolist() == [0]


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (StepPlan(1), "computes nothing"),
        (StepPlan(1, removed_rows=ints(0)), "not all present"),
        (StepPlan(1, removed_rows=ints(7)), "not all rows"),
        (first_plan(row=4), "is not a row of the batch"),
        (first_plan(row=-1), "is not a row of the batch"),
        (first_plan(token_ids=ints(1, 2, 100, 4, 5, 6)), "outside the vocabulary"),
        (first_plan(token_ids=ints()), "has 0 tokens"),
        (first_plan(num_prompt_tokens=7), "7 prompt tokens"),
        (first_plan(num_prompt_tokens=0), "0 prompt tokens"),
        (first_plan(num_computed_tokens=6), "6 computed tokens"),
        (first_plan(num_computed_tokens=2, num_cached_tokens=4), "2 computed tokens"),
        (first_plan(block_ids=ints(3)), "block table's length"),
        (first_plan(block_ids=ints(0, 3)), "outside the pool"),
        (first_plan(block_ids=ints(3, 10)), "outside the pool"),
        (first_plan(block_ids=ints(*range(1, 10))), "block table's length"),
        (first_plan(sampling=RowSampling(temperature=-1.0)), "temperature"),
        (first_plan(sampling=RowSampling(temperature=float("nan"))), "temperature"),
        (first_plan(sampling=RowSampling(top_p=0.0)), "top_p"),
        (first_plan(sampling=RowSampling(min_p=1.5)), "min_p"),
        (first_plan(sampling=RowSampling(num_logprobs=21)), "num_logprobs 21"),
        (replace(first_plan(), chunk_num_tokens=ints(7)), "has 6 left"),
        (replace(first_plan(), chunk_num_tokens=ints(0)), "chunk of 0 tokens"),
        (replace(first_plan(), chunk_num_tokens=ints(1, 2)), "not parallel"),
        (replace(first_plan(), chunk_rows=ints(2)), "not present"),
        (replace(first_plan(), chunk_rows=ints(9)), "computes a row that does not exist"),
        (replace(first_plan(), chunk_rows=ints(1, 1), chunk_num_tokens=ints(1, 1)), "do not ascend"),
        (replace(first_plan(), appended_block_rows=ints(2), appended_block_ids=ints(5)), "not present"),
        (replace(first_plan(), appended_block_rows=ints(9), appended_block_ids=ints(5)), "row that does not exist"),
        (replace(first_plan(), appended_block_rows=ints(1), appended_block_ids=ints(0)), "outside the pool"),
        (replace(first_plan(), appended_block_rows=ints(1), appended_block_ids=ints()), "not parallel"),
        (replace(first_plan(), added_rows=(new_row(), new_row())), "is taken"),
        (replace(first_plan(), added_rows=(new_row(num_tokens=33),)), "33 tokens"),
        (
            StepPlan(
                1,
                added_rows=(new_row(num_tokens=20, block_ids=ints(1, 2, 3, 4, 5)),),
                chunk_rows=ints(1),
                chunk_num_tokens=ints(17),
            ),
            "computes 17 tokens",
        ),
    ],
)
def test_an_impossible_plan_is_refused_and_changes_nothing(plan: StepPlan, problem: str) -> None:
    batch = make_batch()
    with pytest.raises(InvalidPlan, match=problem):
        batch.apply(plan)
    assert not batch.is_present.any()
    assert batch.apply(first_plan()).sampling_rows.tolist() == [1]


def test_wrong_lists_are_found_wherever_they_are_among_the_rows() -> None:
    right, wrong = SamplingLists(allowed_token_ids=(99,)), SamplingLists(allowed_token_ids=(99, 100))
    for lists in ((wrong,), (wrong, wrong), (right, wrong), (right, right, wrong), (right, NO_LISTS, wrong, right)):
        rows = tuple(new_row(row, lists=each) for row, each in enumerate(lists))
        with pytest.raises(InvalidPlan, match=rf"added row {lists.index(wrong)} .*outside the vocabulary"):
            make_batch().apply(StepPlan(1, added_rows=rows))
    rows = tuple(new_row(row, lists=right) for row in range(4))
    make_batch().apply(StepPlan(1, added_rows=rows, chunk_rows=ints(0), chunk_num_tokens=ints(6)))
