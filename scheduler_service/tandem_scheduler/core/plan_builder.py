"""A step plan under construction."""

import numpy as np

from tandem_scheduler.core.logprob_reports import PromptSpan, span_of_chunk
from tandem_scheduler.core.residency import Residency
from tandem_scheduler.core.sequence import Sequence
from tandem_shared.step_plan import Int32Array, NewRow, StepPlan


class PlanBuilder:
    """What the plan holds so far, and how many tokens are left of its budget."""

    def __init__(self, residency: Residency, budget: int, max_chunk_tokens: int | None) -> None:
        """max_chunk_tokens limits the prompt tokens of one sequence; None for no limit but the budget."""
        self.budget = budget
        self.added: list[NewRow] = []
        self.appended_rows: list[int] = []
        self.appended_ids: list[int] = []
        self.chunks: dict[int, int] = {}
        # The prompt tokens whose log-probabilities the step reports, by row.
        self.prompt_spans: dict[int, PromptSpan] = {}
        # Sequences whose chunk reaches their last known token, so that they sample.
        self.completed: list[Sequence] = []
        # Sequences that lost their rows for this plan. It does not admit them again.
        self.preempted: list[Sequence] = []
        self._residency = residency
        self._max_chunk_tokens = max_chunk_tokens

    def add_chunk(self, sequence: Sequence) -> None:
        """Computes the next tokens of a sequence that prefills: as many as are left, or as the limits allow."""
        num_left = len(sequence.token_ids) - sequence.num_computed_tokens
        num_tokens = min(num_left, self.budget, self._max_chunk_tokens or num_left)
        self.budget -= num_tokens
        self.chunks[sequence.row] = num_tokens
        if (span := span_of_chunk(sequence, num_tokens)) is not None:
            self.prompt_spans[sequence.row] = span
        self._residency.compute(sequence, num_tokens)
        if num_tokens == num_left:
            self.completed.append(sequence)

    def add_row(self, new_row: NewRow, sequence: Sequence) -> None:
        """Adds a row that a sequence has just entered, and its first chunk."""
        self.added.append(new_row)
        self.add_chunk(sequence)

    def build(self, step_id: int) -> StepPlan:
        """The whole plan, which also removes the rows that were given back since the last one."""
        chunk_rows = sorted(self.chunks)
        removed_rows = sorted(self._residency.removed_rows)
        self._residency.removed_rows.clear()
        return StepPlan(
            step_id=step_id,
            removed_rows=_ints(removed_rows),
            added_rows=tuple(self.added),
            appended_block_rows=_ints(self.appended_rows),
            appended_block_ids=_ints(self.appended_ids),
            chunk_rows=_ints(chunk_rows),
            chunk_num_tokens=_ints([self.chunks[row] for row in chunk_rows]),
        )


def _ints(values: list[int]) -> Int32Array:
    return np.array(values, np.int32)
