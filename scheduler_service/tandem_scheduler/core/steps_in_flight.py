"""The steps whose results are still to come, and the check that a result fits its plan."""

from collections import deque
from dataclasses import dataclass, field

from tandem_scheduler.core.logprob_reports import PromptSpan, why_unfit
from tandem_scheduler.core.sequence import Sequence
from tandem_shared.errors import ProtocolError
from tandem_shared.step_plan import StepResult


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """The rows that a step samples, ascending, and the sequences that held them when it was planned. prompt_spans: the
    prompt tokens whose log-probabilities it reports, by row.

    A result is never looked up through the rows' present owners: a row may have another one by then.
    """

    step_id: int
    rows: list[int]
    sequences: list[Sequence]
    prompt_spans: dict[int, PromptSpan] = field(default_factory=dict)


class StepsInFlight:
    """The steps in flight of one session, oldest first. Step ids count from 1."""

    def __init__(self) -> None:
        self._steps: deque[StepInFlight] = deque()
        self._next_step_id = 1

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def oldest(self) -> StepInFlight:
        """IndexError where no step is in flight."""
        return self._steps[0]

    def push(self, rows: list[int], sequences: list[Sequence], prompt_spans: dict[int, PromptSpan]) -> int:
        """Adds a new step. Returns its id."""
        step_id = self._next_step_id
        self._next_step_id += 1
        self._steps.append(StepInFlight(step_id, rows, sequences, prompt_spans))
        return step_id

    def pop(self, result: StepResult) -> StepInFlight:
        """Removes and returns the oldest step, which the result must belong to and fit. Raises ProtocolError if it does
        not, and changes nothing then.
        """
        if not self._steps or self._steps[0].step_id != result.step_id:
            raise ProtocolError(f"result of step {result.step_id}, which is not the oldest in flight")
        step = self._steps[0]
        faulty_rows = {fault.row for fault in result.faults}
        expected = [int(row not in faulty_rows) for row in step.rows]
        if result.num_token_ids != expected or len(result.token_ids) != sum(expected):
            raise ProtocolError(f"result of step {result.step_id} does not fit its plan")
        if not faulty_rows.union(report.row for report in result.logprobs) <= set(step.rows):
            raise ProtocolError(f"result of step {result.step_id} speaks of rows that did not sample")
        if (step.prompt_spans or result.prompt_logprobs) and (
            problem := why_unfit(step.prompt_spans, result.prompt_logprobs, faulty_rows)
        ):
            raise ProtocolError(f"result of step {result.step_id} {problem}")
        return self._steps.popleft()

    def count(self, sequence: Sequence) -> int:
        """The number of steps in flight in which the sequence samples."""
        return sum(sequence in step.sequences for step in self._steps)

    def sequences(self) -> set[Sequence]:
        """The sequences that sample in a step in flight."""
        return {sequence for step in self._steps for sequence in step.sequences}
