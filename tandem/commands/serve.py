"""The command `tandem serve`: runs the services until it is interrupted."""

import argparse
import functools
import logging
import os
import signal
import sys
from typing import Any

from tandem.commands.serve_http import NOT_FOR_SERVE, add_http_flags, read_http_flags
from tandem.commands.service_flags import NOT_FOR_USERS, add_service_flags, read_service_flags, refuse_taken_port
from tandem.processes import Services
from tandem_shared.config import add_config_flag, read_config
from tandem_shared.errors import ConfigError
from tandem_shared.extras import require_extra
from tandem_shared.host.log import configure_logging
from tandem_shared.options import variable_of

ALWAYS_SO = ("--enable-auto-tool-choice", "--enable-chunked-prefill", "--enable-prompt-tokens-details")
"""Flags of `vllm serve` that ask for what Tandem always does."""


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
        "served",
        metavar="MODEL",
        nargs="?",
        help="a model folder, a hub id, or 'embedded' for the package's own model; may stand in the file of --config",
    )
    add_config_flag(parser)
    add_service_flags(parser)
    add_http_flags(parser)
    add_vllm_flags(parser)
    parser.set_defaults(run=run)


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags of `vllm serve` that change nothing here, and -tp, so that its command lines can be kept."""
    for flag in ALWAYS_SO:
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    no_code = "has no effect: no code of a model's folder is ever run"
    parser.add_argument("--trust-remote-code", action="store_true", help=no_code)
    calls = "how calls of tools are found in a chat's output: hermes, which is Qwen3's form"
    parser.add_argument("--tool-call-parser", choices=("hermes",), help=calls)
    parser.add_argument("-tp", dest="tp_size", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    require_extra("worker")
    file = read_config(options, "tandem serve", without={*NOT_FOR_SERVE, *NOT_FOR_USERS} - {"model"})
    if options.served is None and "model" not in file and not os.environ.get(variable_of("model")):
        raise ConfigError("give a MODEL: a folder, a hub id, or 'embedded'")
    options.model = options.served
    worker, scheduler = read_service_flags(options, file)
    refuse_taken_port("--port", scheduler.host, scheduler.port)
    refuse_taken_port("--metrics-port", scheduler.host, scheduler.metrics_port or 0)
    gateway = read_http_flags(options, os.environ, scheduler, file)
    say = functools.partial(_say, scheduler.log_format)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Services(worker, scheduler, gateway=gateway) as services:
            say(f"listening on {services.address}")
            if services.http_address:
                say(f"HTTP on http://{services.http_address}")
            say(f"ready; a page to chat is http://{services.http_address}/" if services.http_address else "ready")
            services.wait()
    except KeyboardInterrupt:
        return 0


def _say(form: str, text: str) -> None:
    """Writes a line to stderr, in the form of the services' log."""
    if form == "json":
        configure_logging("info", form, "tandem serve")
        logging.getLogger(__name__).info("%s", text)
    else:
        print(f"tandem serve: {text}", file=sys.stderr)
