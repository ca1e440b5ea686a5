"""The command `tandem`. Its commands are in tandem/commands.

Exit status 0 is success, 1 a failure, 2 a wrong command line or a missing extra of the package, 130 an interrupt.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import grpc

from tandem.commands import bench, chat, demo, generate, serve, top
from tandem.outputs import text_of
from tandem_shared import VERSION
from tandem_shared.config import SETTINGS
from tandem_shared.errors import ConfigError, TandemError
from tandem_shared.options import refuse_unknown_variables, spell_out_booleans


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(spell_out_booleans(given, *SETTINGS))
    try:
        refuse_unknown_variables(os.environ, SETTINGS)
        return int(options.run(options))
    except ConfigError as error:
        print(f"tandem {options.command}: {error}", file=sys.stderr)
        return 2
    except (TandemError, grpc.RpcError) as error:
        print(f"tandem {options.command}: {text_of(error)}", file=sys.stderr)
        if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAVAILABLE:
            print("Is a server there? `tandem serve MODEL` starts one; --address names another.", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output has gone, as in `tandem generate ... | head -1`. Python would fail again at its end,
        # when it writes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tandem", description="An LLM inference engine in two gRPC services.")
    parser.add_argument("--version", action="version", version=f"tandem {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (serve, generate, chat, bench, top, demo):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
