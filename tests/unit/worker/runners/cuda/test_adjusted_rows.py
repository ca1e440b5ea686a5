"""The state of the logits stage follows from each row alone, whichever rows enter the batch together."""

import copy

import numpy as np
import torch

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import SamplingLists
from tandem_shared.step_plan import NewRow
from tandem_worker.runners.cuda.adjusted_rows import AdjustedRowsState

VOCAB_SIZE = 100
LONG = SamplingLists(
    stop_token_ids=(5,), logit_bias=((7, 1.5), (8, -2.0)), allowed_token_ids=(1, 33, 99), bad_words=((4,), (5, 6))
)
SHORT = SamplingLists(allowed_token_ids=(2,))


def new_row(row: int, lists: SamplingLists) -> NewRow:
    """A row like no other but for its lists."""
    tokens = np.arange(row, 3 * row + 4, dtype=np.int32)
    penalty = 0.5 if row % 2 else 0.0
    sampling = RowSampling(min_tokens=3, presence_penalty=penalty, choice_index=row)
    return NewRow(row, row, tokens, row + 2, 0, 0, np.ones(1, np.int32), sampling, lists)


def make_state() -> AdjustedRowsState:
    return AdjustedRowsState(6, VOCAB_SIZE, slice(20, 60), torch.device("cpu"))


def test_rows_that_share_lists_are_written_as_each_alone() -> None:
    rows = [new_row(row, lists) for row, lists in enumerate([LONG, LONG, SHORT, LONG, SHORT, SHORT])]
    together, apart = make_state(), make_state()
    together.add(rows)
    for row in rows:
        apart.add([copy.deepcopy(row)])
    for name in ("seen", "masks", "notes"):
        assert torch.equal(getattr(together.rows, name), getattr(apart.rows, name)), name
    # The allowed tokens of a row stay its own where a grammar narrows those of another.
    bits = np.full((1, together.rows.masks.shape[1]), -1, np.int32)
    together.set_masks(np.array([1]), bits & 2)
    together.set_masks(np.array([0]), bits)
    assert together.rows.masks[0].tolist() == together.rows.masks[3].tolist() != together.rows.masks[1].tolist()
