"""The command `tandem`: serve, generate, demo.

Exit status 0 is success, 1 a failure, 2 a wrong command line or a missing extra of the package, 130 an interrupt.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc

from tandem.client import TandemClient
from tandem.demo import run_demo
from tandem.processes import Services
from tandem.sampling_params import SamplingParams
from tandem.structured_output import StructuredOutput
from tandem.terminal import stream_text
from tandem_shared.config import SchedulerSettings, WorkerSettings, check_tls
from tandem_shared.errors import ConfigError, TandemError
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.options import add_options, option_names, read_settings, refuse_unknown_variables
from tandem_shared.sampling_fields import REQUEST_FIELDS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _build_parser()
    options = parser.parse_args(arguments)
    try:
        refuse_unknown_variables(os.environ, (SchedulerSettings, WorkerSettings, GatewaySettings))
        return int(options.run(options))
    except ConfigError as error:
        print(f"tandem {options.command}: {error}", file=sys.stderr)
        return 2
    except (TandemError, grpc.RpcError) as error:
        details = error.details() if isinstance(error, grpc.Call) else error
        print(f"tandem {options.command}: {details}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tandem", description="An LLM inference engine in two gRPC services.")
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser(
        "serve",
        help="run a scheduler and a worker service on this machine",
        description="Runs a worker and a scheduler service; a worker that dies is started again. "
        "--port and the TLS flags are for the scheduler; the worker listens on a free port, on this machine only.",
        allow_abbrev=False,
    )
    serve.add_argument(
        "served", metavar="MODEL", help="a model folder, a hub id, or 'embedded' for the package's own model"
    )
    add_options(serve, SchedulerSettings, WorkerSettings, without=("model", "port_file", "worker_address", "worker_ca"))
    serve.set_defaults(run=_serve)

    generate = commands.add_parser("generate", help="stream text from a running server", allow_abbrev=False)
    generate.add_argument("prompt", help="text that the model continues")
    generate.add_argument("--address", default="127.0.0.1:50051", help="HOST:PORT of the server; default %(default)s")
    generate.add_argument(
        "--max-tokens", type=int, default=128, help="the largest number of output tokens; default %(default)s"
    )
    generate.add_argument("--min-tokens", type=int, help="the output does not end before so many tokens; default: 0")
    help_texts = {"seed": "makes the output repeatable; default: one per request"}
    for field in REQUEST_FIELDS:
        default = "what the model recommends" if field.has_model_default else field.default
        help_text = help_texts.get(field.name, f"default: {default}")
        generate.add_argument(f"--{field.name.replace('_', '-')}", type=field.kind, help=help_text)
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    form = generate.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="a file with the JSON schema that the output follows")
    form.add_argument("--regex", metavar="PATTERN", help="a regular expression that matches the whole output")
    form.add_argument("--choice", action="append", metavar="TEXT", help="a possible output; may be repeated")
    generate.add_argument("--ignore-eos", action="store_true", help="continue after the end-of-sequence token")
    generate.set_defaults(run=_generate)

    demo = commands.add_parser("demo", help="start both services, stream text from the package's own model, stop them")
    demo.set_defaults(run=_demo)
    return parser


def _serve(options: argparse.Namespace) -> int:
    options.model = options.served
    scheduler = read_settings(SchedulerSettings, options, os.environ)
    check_tls(scheduler)
    # The worker's only client is the scheduler beside it, so it takes a free port and no TLS.
    private = ("host", "port", "port_file", "tls_cert", "tls_key", "tls_client_ca")
    worker_options = argparse.Namespace(**{k: v for k, v in vars(options).items() if k not in private}, port="0")
    environment = {name: value for name, value in os.environ.items() if name not in option_names(private)}
    worker = read_settings(WorkerSettings, worker_options, environment)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with Services(worker, scheduler) as services:
            print(f"tandem serve: listening on {services.address}", file=sys.stderr)
            services.wait()
    except KeyboardInterrupt:
        return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _generate(options: argparse.Namespace) -> int:
    params = SamplingParams(
        structured_outputs=_form(options),
        min_tokens=options.min_tokens,
        **{field.name: getattr(options, field.name) for field in REQUEST_FIELDS},
        max_tokens=options.max_tokens,
        stop=tuple(options.stop),
        ignore_eos=options.ignore_eos or None,
    )
    with TandemClient(options.address) as client:
        speed = stream_text(client, options.prompt, params)
    print(flush=True)
    print(speed, file=sys.stderr)
    return 0


def _form(options: argparse.Namespace) -> StructuredOutput | None:
    """Raises ConfigError for a file that can't be read."""
    if options.json_schema is not None:
        try:
            return StructuredOutput(json=Path(options.json_schema).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--json-schema: {error}") from error
    if options.regex is not None:
        return StructuredOutput(regex=options.regex)
    return None if options.choice is None else StructuredOutput(choice=options.choice)


def _demo(options: argparse.Namespace) -> int:
    # SIGTERM, like Ctrl-C, stops the services and removes their temporary folder.
    signal.signal(signal.SIGTERM, _interrupt)
    run_demo()
    return 0


if __name__ == "__main__":
    sys.exit(main())
