"""The command `tandem serve`: runs the services until it is interrupted."""

import argparse
import os
import signal
import sys
from typing import Any

from tandem.commands.serve_http import add_http_flags, read_http_flags
from tandem.commands.service_flags import add_service_flags, read_service_flags, refuse_taken_port
from tandem.processes import Services
from tandem_shared.extras import require_extra


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="run a scheduler and a worker service on this machine",
        description="Runs a worker and a scheduler service; a worker that dies is started again. "
        "--port and the TLS flags are for the scheduler; the worker listens on a free port, on this machine only. "
        "OpenAI's HTTP API is on --http-port.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "served", metavar="MODEL", help="a model folder, a hub id, or 'embedded' for the package's own model"
    )
    add_service_flags(parser)
    add_http_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    options.model = options.served
    worker, scheduler = read_service_flags(options)
    require_extra("worker")
    refuse_taken_port("--port", scheduler.host, scheduler.port)
    gateway = read_http_flags(options, os.environ, scheduler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Services(worker, scheduler, gateway=gateway) as services:
            print(f"tandem serve: listening on {services.address}", file=sys.stderr)
            if services.http_address:
                print(f"tandem serve: HTTP on http://{services.http_address}", file=sys.stderr)
            page = f"; a page to chat is http://{services.http_address}/" if services.http_address else ""
            print(f"tandem serve: ready{page}", file=sys.stderr)
            services.wait()
    except KeyboardInterrupt:
        return 0
