"""What a program needs in order to be a worker whose runner is wrapped by one of the tests."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem_shared.config import WorkerSettings, read_command_line
from tandem_shared.host.log import configure_logging
from tandem_shared.host.supervisor import Supervisor
from tandem_shared.step_plan import StepPlan, WorkerInfo

SERVE = "--serve"
"""The first argument of the worker's process; without it the process is the supervisor."""


class WrappedRunner:
    """A runner that does what the runner inside it does."""

    def __init__(self, runner: Any, file: Path) -> None:
        """file keeps what the next process has to know."""
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
    """Runs the program `module`, whose arguments are FILE and a worker's flags."""
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
