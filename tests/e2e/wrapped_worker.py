"""tandem-worker with a runner of the tests around its own: what a program needs for that."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem_shared.config import WorkerSettings, read_command_line
from tandem_shared.host.log import configure_logging
from tandem_shared.host.supervisor import Supervisor
from tandem_shared.step_plan import StepPlan, WorkerInfo

SERVE = "--serve"
"""The first argument of a process that is the worker, not its supervisor."""


class WrappedRunner:
    """Does as its runner does."""

    def __init__(self, runner: Any, file: Path) -> None:
        """file: where what this process knows outlives it."""
        self._runner = runner
        self._file = file

    @property
    def info(self) -> WorkerInfo:
        info: WorkerInfo = self._runner.info
        return info

    @property
    def progress(self) -> int:
        return int(self._runner.progress)

    def execute(self, plan: StepPlan) -> Any:
        return self._runner.execute(plan)

    def reset(self) -> None:
        self._runner.reset()

    def close(self) -> None:
        self._runner.close()


def main(module: str, wrap: Callable[[Any, Path], WrappedRunner]) -> int:
    """Takes FILE FLAGS from the command line. module: the program that calls this."""
    arguments = sys.argv[1:]
    if arguments[0] != SERVE:
        configure_logging("info")
        return Supervisor("worker", [sys.executable, "-m", module, SERVE, *arguments]).run()
    from tandem_worker.service.process import run
    from tandem_worker.service.servicer import WorkerServicer

    _, file, *flags = arguments
    settings = read_command_line(WorkerSettings, module, "", flags)
    configure_logging(settings.log_level)
    run(settings, lambda runner, **options: WorkerServicer(wrap(runner, Path(file)), **options))
    return 0
