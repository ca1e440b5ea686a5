"""tandem-worker: a supervisor (tandem_shared/host/supervisor.py) with the worker service (process.py) as its child.

A rank of a tensor-parallel group that torchrun or rank 0 has started is the service itself: what started the rank also
ends it. Nothing here imports torch or grpc unless it is needed, as the supervisor lives for as long as the service.
"""

import os
import sys

from tandem_shared.config import WorkerSettings, read_command_line
from tandem_shared.host.log import configure_logging
from tandem_shared.host.supervisor import Supervisor
from tandem_shared.options import to_arguments


def main() -> None:
    settings = read_command_line(
        WorkerSettings, "tandem-worker", "Runs a Qwen3 model for a scheduler service.", extra="worker"
    )
    configure_logging(settings.log_level, settings.log_format, "worker")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from tandem_worker.service.process import run_and_exit

        run_and_exit(settings)
    command = [sys.executable, "-m", "tandem_worker.service.process", *to_arguments(settings)]
    sys.exit(Supervisor("worker", command).run())


if __name__ == "__main__":
    main()
