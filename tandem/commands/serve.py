"""The command `tandem serve`: runs both services until it is interrupted."""

import argparse
import signal
import sys
from typing import Any

from tandem.commands.service_flags import add_service_flags, read_service_flags
from tandem.processes import Services


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="run a scheduler and a worker service on this machine",
        description="Runs a worker and a scheduler service; a worker that dies is started again. "
        "--port and the TLS flags are for the scheduler; the worker listens on a free port, on this machine only.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "served", metavar="MODEL", help="a model folder, a hub id, or 'embedded' for the package's own model"
    )
    add_service_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    options.model = options.served
    worker, scheduler = read_service_flags(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Services(worker, scheduler) as services:
            print(f"tandem serve: listening on {services.address}", file=sys.stderr)
            services.wait()
    except KeyboardInterrupt:
        return 0
