"""The command `tandem top`: what a running server does now."""

import argparse
from typing import Any

from tandem.commands.connection import add_connection_flags, connect
from tandem_shared.errors import ConfigError
from tandem_shared.extras import require_extra


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "top",
        help="watch a running server",
        description="Shows load, use of the KV cache, hits of the prefix cache and rates of a running server, until "
        "Ctrl-C. Rates are of the last interval. If stdout is no terminal, it prints them once.",
        allow_abbrev=False,
    )
    add_connection_flags(parser)
    parser.add_argument("--interval-s", type=float, default=1.0, help="seconds between two looks; default %(default)s")
    parser.add_argument("--once", action="store_true", help="print once, after one interval")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    require_extra("cli")
    if not 0.1 <= options.interval_s <= 3600:
        raise ConfigError(f"--interval-s must be in [0.1, 3600], is {options.interval_s}")
    # Needs the extra.
    from tandem.commands.dashboard import watch

    # A server that is not there is shown as such, and asked again at the next look.
    with connect(options, max_retries=0) as client:
        return watch(client, options.interval_s, once=options.once)
