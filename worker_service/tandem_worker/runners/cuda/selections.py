"""Which of a step's rows each of the stages after the forward pass is for, as the rows' options tell it on the host.

Each sampling row belongs to one of the first six selections, by what its sampler must do and which logits it reads, so
that no row pays for what another one asks. A selection is a list of places among the step's sampling rows. The lists
lie on the device at fixed places, and are copied there only where they have changed, which is seldom.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from tandem_shared.step_plan import Int32Array
from tandem_worker.kernels.top_k import MAX_TOP_K
from tandem_worker.runners.cuda.input_layout import ALIGNMENT, PADDING_ROW
from tandem_worker.runners.logprobs import LogprobRows, logprob_rows
from tandem_worker.runners.row_options import RowOptions


class Selection(IntEnum):
    PLAIN = 0
    """Greedy, or with a temperature alone"""
    TOP_K = 1
    """With a top-k up to MAX_TOP_K, and perhaps top-p and min-p"""
    THRESHOLD = 2
    """With top-p or min-p and no top-k, or with a larger top-k"""
    ADJUSTED_PLAIN = 3
    """The same three for rows that are sampled from adjusted logits"""
    ADJUSTED_TOP_K = 4
    ADJUSTED_THRESHOLD = 5
    ADJUSTED = 6
    """All rows whose logits are adjusted"""
    REPORTED = 7
    """Rows whose log-probabilities are reported"""


SAMPLED = tuple(Selection)[:6]
"""The selections that each sampling row is in one of"""


@dataclass(frozen=True)
class StepSampling:
    """How a step's rows are sampled."""

    num_rows: int
    """How many rows are sampled from"""
    counts: tuple[int, ...]
    """How many of them are in each selection"""
    reported: LogprobRows | None
    """The rows whose log-probabilities are reported, if any"""


class RowSelections:
    """Selects rows, and keeps the lists that the device should have."""

    def __init__(self, num_rows: int, options: RowOptions) -> None:
        self._options = options
        width = -(-num_rows // ALIGNMENT) * ALIGNMENT
        self._all_places = np.arange(width, dtype=np.int32)
        self.lists = np.tile(self._all_places, (len(Selection), 1))
        """(selections, rows): each one's places, then padding. Sampling rows may be padding too, so a selection of all
        of them lists all places, whatever their number.
        """
        self._rows: Int32Array | None = None
        self._latest = StepSampling(0, (0,) * len(Selection), None)

    def select(self, rows: Int32Array, *, has_new_rows: bool) -> tuple[StepSampling, bool]:
        """How the step's sampling rows are sampled, and whether the lists have changed. has_new_rows: whether rows have
        entered the batch since the last step.
        """
        if not has_new_rows and self._rows is not None and np.array_equal(rows, self._rows):
            return self._latest, False
        options = self._options
        top_k = options.top_k[rows]
        is_threshold = (top_k > MAX_TOP_K) | ((top_k == 0) & options.has_threshold[rows])
        group = np.where(is_threshold, int(Selection.THRESHOLD), np.where(top_k > 0, int(Selection.TOP_K), 0))
        group += np.where(options.adjusts[rows], int(Selection.ADJUSTED_PLAIN), 0)
        chosen = [group == selection for selection in SAMPLED]
        chosen += [options.adjusts[rows], options.reports[rows]]
        has_changed = [self._set(selection, is_in) for selection, is_in in zip(Selection, chosen, strict=True)]
        counts = tuple(int(is_in.sum()) for is_in in chosen)
        self._rows, self._latest = rows.copy(), StepSampling(len(rows), counts, logprob_rows(rows, options))
        return self._latest, any(has_changed)

    def _set(self, selection: Selection, is_in: np.ndarray) -> bool:
        """Whether the list has changed. That of an empty selection stays as it was, as nothing reads it."""
        places = is_in.nonzero()[0]
        if not len(places):
            return False
        wanted = self._all_places
        if len(places) < len(is_in):
            wanted = np.full_like(wanted, PADDING_ROW)
            wanted[: len(places)] = places
        if np.array_equal(wanted, self.lists[selection]):
            return False
        self.lists[selection] = wanted
        return True
