"""A worker with a step that fails once: `python -m tests.e2e.failing_worker MARKER FLAGS`.

The step fails if the file MARKER does not exist, and makes the file, so that the next worker does not fail.
"""

import sys
from typing import Any

from tandem_shared.step_plan import StepPlan
from tests.e2e.wrapped_worker import WrappedRunner, main

FAILING_STEP = 30


class FailingRunner(WrappedRunner):
    def execute(self, plan: StepPlan) -> Any:
        if plan.step_id == FAILING_STEP and not self._file.exists():
            self._file.touch()
            raise RuntimeError("this step was to fail")
        return super().execute(plan)


if __name__ == "__main__":
    sys.exit(main("tests.e2e.failing_worker", FailingRunner))
