"""The command `tandem generate`: streams the output of one prompt."""

import argparse
import sys
from typing import Any

from tandem.calls import Prompt
from tandem.chat import Chat
from tandem.commands.connection import add_connection_flags, connect
from tandem.commands.sampling_flags import add_form_flags, add_sampling_flags, form_of, params_of
from tandem.commands.terminal import stream_text
from tandem_shared.errors import ConfigError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="stream text from a running server",
        description="Streams the output of a prompt to stdout, and its speed to stderr.",
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", help="text that the model continues; if it is left out, or -, stdin is")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message, which the model's chat template frames"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message before it; needs --chat")
    add_connection_flags(parser)
    parser.add_argument(
        "--timeout-s", type=float, help="the time in seconds after which the request is dropped; default: none"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=128, help="the largest number of output tokens; default %(default)s"
    )
    parser.add_argument("--min-tokens", type=int, help="the output does not end before so many tokens; default: 0")
    parser.add_argument("--ignore-eos", action="store_true", help="continue after the end-of-sequence token")
    add_sampling_flags(parser)
    add_form_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    params = params_of(
        options,
        structured_outputs=form_of(options),
        min_tokens=options.min_tokens,
        max_tokens=options.max_tokens,
        ignore_eos=options.ignore_eos or None,
    )
    prompt = _prompt(options)
    with connect(options) as client:
        speed = stream_text(client, prompt, params, options.timeout_s)
    print(flush=True)
    print(speed, file=sys.stderr)
    return 0


def _prompt(options: argparse.Namespace) -> Prompt:
    if options.system is not None and not options.chat:
        raise ConfigError("--system needs --chat")
    if options.timeout_s is not None and not options.timeout_s > 0:
        raise ConfigError(f"--timeout-s must be above 0, is {options.timeout_s}")
    text: str = options.prompt
    if text is None and sys.stdin.isatty():
        raise ConfigError("give a prompt, or let stdin be one: tandem generate < FILE")
    if text in (None, "-"):
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise ConfigError(f"stdin: {error}") from error
    if not options.chat:
        return text
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return Chat([*system, {"role": "user", "content": text}])
