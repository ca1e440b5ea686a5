"""A step plan under construction."""

import numpy as np

from tandem_scheduler.core.sequence import Sequence
from tandem_shared.step_plan import Int32Array, NewRow, StepPlan


class PlanBuilder:
    """What the plan holds so far, and the tokens that are left of its budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.added: list[NewRow] = []
        self.appended_rows: list[int] = []
        self.appended_ids: list[int] = []
        self.chunks: dict[int, int] = {}
        # Sequences whose chunk reaches their last known token, so that they sample.
        self.completed: list[Sequence] = []

    def build(self, step_id: int, removed_rows: list[int]) -> StepPlan:
        chunk_rows = sorted(self.chunks)
        return StepPlan(
            step_id=step_id,
            removed_rows=_ints(sorted(removed_rows)),
            added_rows=tuple(self.added),
            appended_block_rows=_ints(self.appended_rows),
            appended_block_ids=_ints(self.appended_ids),
            chunk_rows=_ints(chunk_rows),
            chunk_num_tokens=_ints([self.chunks[row] for row in chunk_rows]),
        )


def _ints(values: list[int]) -> Int32Array:
    return np.array(values, np.int32)
