"""A tandem-worker that some prompts take down: `python -m tests.chaos.support.poisoned_worker FAILURES FLAGS`.

A sequence whose prompt begins with a token of POISONS takes the worker down each time that a certain output token of it
is computed; the prompt's second token says which. The file FAILURES gets a line with the time (time.monotonic()).
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

from tandem_shared.step_plan import NewRow, StepPlan
from tests.e2e.wrapped_worker import WrappedRunner, main

FAILS, VANISHES = "fails", "vanishes"
POISONS = {1022: FAILS, 1023: VANISHES}
"""What happens to the worker, by a prompt's first token: a step fails with an error, or the process is killed. They are
the last tokens of the tests' vocabulary.
"""


def poisonous_prompt(kind: str, num_outputs: int) -> list[int]:
    """The prompt of a request that takes the worker down instead of giving output token num_outputs, counted from 0."""
    return [next(token for token, name in POISONS.items() if name == kind), num_outputs]


@dataclass
class _Poison:
    kind: str
    num_known: int
    num_computed: int
    fails_at: int
    """The number of computed tokens at which the worker goes down."""


class PoisonedRunner(WrappedRunner):
    _poisons: dict[int, _Poison]
    """The poisonous sequences in the batch, by row."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._poisons = {}

    def execute(self, plan: StepPlan) -> Any:
        for row in plan.removed_rows.tolist():
            self._poisons.pop(row, None)
        for new in plan.added_rows:
            if kind := POISONS.get(int(new.token_ids[0])):
                self._poisons[new.row] = _Poison(kind, len(new.token_ids), new.num_computed_tokens, _fails_at(new))
        chunks = dict(zip(plan.chunk_rows.tolist(), plan.chunk_num_tokens.tolist(), strict=True))
        for row, poison in self._poisons.items():
            poison.num_computed += chunks.get(row, int(poison.num_computed >= poison.num_known))
            if poison.num_computed >= poison.fails_at:
                self._fail(poison.kind)
        return super().execute(plan)

    def reset(self) -> None:
        self._poisons.clear()
        super().reset()

    def _fail(self, kind: str) -> None:
        with self._file.open("a") as file:
            file.write(f"{time.monotonic()}\n")
        if kind == VANISHES:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("this step computes poison")


def _fails_at(new: NewRow) -> int:
    return new.num_prompt_tokens + int(new.token_ids[1])


if __name__ == "__main__":
    sys.exit(main("tests.chaos.support.poisoned_worker", PoisonedRunner))
