"""The command `tandem chat`: a conversation in the terminal, with a running server or one of its own."""

import argparse
import signal
import sys
import tempfile
from typing import Any

from tandem.commands.connection import add_connection_flags, connect
from tandem.commands.sampling_flags import add_sampling_flags, params_of
from tandem.commands.service_flags import PRIVATE, add_service_flags, read_service_flags
from tandem.processes import ServiceFailed, Services
from tandem_shared.errors import ConfigError
from tandem_shared.extras import require_extra

STARTUP_TIMEOUT_S = 3600.0
DESCRIPTION = """Talks with a model. Without MODEL it asks the server at --address; with MODEL it starts both services,
and stops them at its end. Ctrl-C stops an answer, and the chat goes on. At the prompt:
/system TEXT sets the system message (without TEXT there is none), /reset begins a new conversation, /quit or Ctrl-D
ends.
"""

OWN = (*PRIVATE, "api_key_file")
"""Settings that nobody gives the services of a chat, which nobody else reaches."""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "chat", help="talk with a model in the terminal", description=DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument(
        "served", nargs="?", metavar="MODEL", help="a model to serve: a folder, a hub id, or 'embedded'"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="whether the model thinks before it answers, if its chat template asks; default: the template's own",
    )
    parser.add_argument(
        "--max-tokens", type=int, help="the largest number of tokens of an answer; default: what the context has left"
    )
    add_connection_flags(parser)
    add_sampling_flags(parser)
    services = parser.add_argument_group("settings of the services, with MODEL")
    add_service_flags(services, without=OWN)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    require_extra("cli")
    params = params_of(options, max_tokens=options.max_tokens)
    signal.signal(signal.SIGTERM, _end)
    if options.served is None:
        return _talk(options, params)
    if options.address or options.tls or options.ca:
        raise ConfigError("give either MODEL, to serve it, or the address of a server that runs")
    # The services are for this chat alone, whatever the environment says.
    private = dict.fromkeys(OWN, "") | {"host": "127.0.0.1", "port": "0"}
    vars(options).update(private, model=options.served)
    worker, scheduler = read_service_flags(options)
    with tempfile.TemporaryFile("w+") as log:
        try:
            print(f"starting the services for {options.model} ...", file=sys.stderr)
            with Services(worker, scheduler, log) as services:
                services.wait_until_ready(STARTUP_TIMEOUT_S)
                options.address = services.address
                return _talk(options, params)
        except ServiceFailed as error:
            log.seek(0)
            raise ServiceFailed(f"{error}\n{log.read()}") from error


def _talk(options: argparse.Namespace, params: Any) -> int:
    # Needs the extra.
    from tandem.commands.conversation import Conversation

    with connect(options) as client:
        Conversation(client, params, options.system, options.thinking).run()
    return 0


def _end(*_: object) -> None:
    """Ends the command at SIGTERM; an interrupt would only stop an answer."""
    sys.exit(128 + signal.SIGTERM)
