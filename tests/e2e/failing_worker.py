"""tandem-worker with a step that fails once: `python -m tests.e2e.failing_worker MARKER FLAGS`. It fails if the file
MARKER is not there, and makes it, so that the next worker does not fail.
"""

import sys
from pathlib import Path
from typing import Any

from shared.config import WorkerSettings, read_command_line
from shared.log import configure_logging
from shared.step_plan import StepPlan, WorkerInfo
from shared.supervisor import Supervisor

FAILING_STEP = 30
SERVE = "--serve"
"""Before MARKER: this process is the worker, not its supervisor."""


class FailingRunner:
    def __init__(self, runner: Any, marker: Path) -> None:
        self._runner = runner
        self._marker = marker

    @property
    def info(self) -> WorkerInfo:
        info: WorkerInfo = self._runner.info
        return info

    @property
    def progress(self) -> int:
        return int(self._runner.progress)

    def execute(self, plan: StepPlan) -> Any:
        if plan.step_id == FAILING_STEP and not self._marker.exists():
            self._marker.touch()
            raise RuntimeError("this step was to fail")
        return self._runner.execute(plan)

    def reset(self) -> None:
        self._runner.reset()

    def close(self) -> None:
        self._runner.close()


def main(arguments: list[str]) -> int:
    if arguments[0] != SERVE:
        configure_logging("info")
        return Supervisor("worker", [sys.executable, "-m", "tests.e2e.failing_worker", SERVE, *arguments]).run()
    from worker_service.process import run
    from worker_service.servicer import WorkerServicer

    _, marker, *flags = arguments
    settings = read_command_line(WorkerSettings, "failing_worker", "", flags)
    configure_logging(settings.log_level)
    run(settings, lambda runner, **options: WorkerServicer(FailingRunner(runner, Path(marker)), **options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
