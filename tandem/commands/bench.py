"""The command `tandem bench`: throughput and latencies of a running server at request rates."""

import argparse
import math
import os
from typing import Any
from urllib.parse import urlsplit

from tandem.commands.connection import add_connection_flags, connect
from tandem_shared.errors import ConfigError
from tandem_shared.extras import require_extra

DESCRIPTION = """Sends requests with random prompts to a running server, when they are due and however slow it is, and
reports throughput, time to first token (TTFT), gaps between messages (ITL), mean time of a later token (TPOT) and the
time of whole requests (E2E). TTFT and E2E count from the time at which a request was due. The server is a Tandem at
--address over gRPC, or any server with OpenAI's HTTP API at --base-url; its key is read from the variable
OPENAI_API_KEY, if there is one."""

COMPLETIONS, CHAT_COMPLETIONS = "/v1/completions", "/v1/chat/completions"
BACKENDS = {"openai": COMPLETIONS, "vllm": COMPLETIONS, "openai-chat": CHAT_COMPLETIONS}
"""vLLM's names of what is asked of a server -> where, unless the user says otherwise."""

MAX_TOKEN_ID = 10_000
"""Well below the special tokens at the end of a real vocabulary."""


MAX_DEFAULT_CLIENTS = 8
"""The most client processes that are started unless the user says how many. docs/performance-log.md, "what an event
costs the HTTP gateway and a client", has what one takes."""


def add(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure a running server", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--base-url", metavar="URL", help="a server with OpenAI's HTTP API, such as http://HOST:8000")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="what is asked of the server at --base-url, as vLLM's benchmark names it: conversations (openai-chat) or "
        "completions; default: what --endpoint says, and completions without it",
    )
    parser.add_argument(
        "--endpoint",
        metavar="PATH",
        help="default: /v1/completions, or /v1/chat/completions with --backend openai-chat",
    )
    parser.add_argument("--model", help="the model's name there; default: the first that the server lists")
    parser.add_argument(
        "--openai-fields-only",
        action="store_true",
        help="send no fields of vLLM's, such as ignore_eos, to servers that refuse them; outputs may then end early",
    )
    add_connection_flags(parser)
    parser.add_argument(
        "--request-rate",
        type=_rate,
        nargs="+",
        default=[math.inf],
        metavar="RATE",
        help="requests a second, of a Poisson process; inf sends all at once; several are measured in turn; "
        "default: inf",
    )
    parser.add_argument(
        "--max-concurrency",
        type=_count,
        metavar="N",
        help="requests that run at once at most, shared evenly among the client processes; one that must wait is due "
        "when it has a place",
    )
    parser.add_argument("--num-prompts", type=_count, default=100, help="requests at each rate; default %(default)s")
    for what, default in (("input", (256, 256)), ("output", (128, 128))):
        parser.add_argument(
            f"--random-{what}-len",
            type=_length,
            default=default,
            metavar="N | MIN-MAX",
            help=f"tokens of each {what}, drawn evenly from a range; default {default[0]}"
            + ("; a conversation has as many words" if what == "input" else ""),
        )
    parser.add_argument(
        "--vocab-size",
        type=_count,
        help=f"the ids of prompts are below this number; default: the model's vocabulary, if known, and at most "
        f"{MAX_TOKEN_ID}",
    )
    parser.add_argument("--temperature", type=float, default=0.6, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts, lengths and times; default %(default)s")
    parser.add_argument("--num-warmups", type=int, default=8, help="requests before, unmeasured; default %(default)s")
    parser.add_argument(
        "--clients",
        type=_count,
        default=max(1, min(MAX_DEFAULT_CLIENTS, (os.cpu_count() or 1) // 2)),
        help=f"client processes; default: one for two CPUs, at most {MAX_DEFAULT_CLIENTS}, here %(default)s",
    )
    parser.add_argument(
        "--slo-ttft-ms", type=float, default=500.0, help="the TTFT up to which a request is good; default %(default)s"
    )
    parser.add_argument(
        "--slo-tpot-ms", type=float, default=30.0, help="the TPOT up to which a request is good; default %(default)s"
    )
    parser.add_argument("--out", metavar="FILE", help="write the result to this file as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    require_extra("cli")
    # Need the extra.
    from tandem.commands.load.measure import measure
    from tandem.commands.load.workload import Workload

    target, vocab_size = _target(options)
    workload = Workload(
        options.random_input_len,
        options.random_output_len,
        options.vocab_size or min(vocab_size, MAX_TOKEN_ID),
        options.temperature,
        options.seed,
        _is_chat(options),
    )
    return measure(target, workload, options)


def _target(options: argparse.Namespace) -> tuple[Any, int]:
    """The server that is measured, and the size of its model's vocabulary, or a guess if that is not known."""
    from tandem.commands.load.grpc_target import GrpcTarget
    from tandem.commands.load.http_target import HttpTarget, model_of

    if options.base_url is None:
        if options.model or options.openai_fields_only or options.backend or options.endpoint:
            raise ConfigError("--model, --backend, --endpoint and --openai-fields-only need --base-url")
        with connect(options) as client:
            info = client.model_info()
        return GrpcTarget(options, info.model), info.vocab_size
    if options.address or options.tls or options.ca or options.client_cert:
        raise ConfigError("give either --base-url or the flags of a gRPC server")
    base_url = _base_url(options.base_url)
    endpoint = options.endpoint or BACKENDS[options.backend or "openai"]
    if not endpoint.startswith("/"):
        raise ConfigError(f"--endpoint must begin with /, is {endpoint!r}")
    is_chat = _is_chat(options)
    if options.backend and is_chat != endpoint.endswith("/chat/completions"):
        raise ConfigError(f"--backend {options.backend} does not go with --endpoint {endpoint}")
    api_key = os.environ.get("OPENAI_API_KEY")
    model = options.model or model_of(base_url, api_key)
    return HttpTarget(base_url + endpoint, model, is_chat, not options.openai_fields_only, api_key), MAX_TOKEN_ID


def _is_chat(options: argparse.Namespace) -> bool:
    if options.backend:
        return bool(BACKENDS[options.backend] == CHAT_COMPLETIONS)
    return (options.endpoint or "").endswith("/chat/completions")


def _base_url(given: str) -> str:
    """The address up to what comes before /v1. Raises ConfigError."""
    try:
        parts = urlsplit(given)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right or not given.isprintable() or " " in given:
        raise ConfigError(f"--base-url must be http://HOST:PORT or https://HOST:PORT, is {given!r}")
    # OpenAI's SDK wants addresses with /v1, vLLM's benchmark without.
    return given.rstrip("/").removesuffix("/v1")


def _rate(text: str) -> float:
    if not (rate := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, is {text}")
    return rate


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {text}")
    return count


def _length(text: str) -> tuple[int, int]:
    """N or MIN-MAX."""
    least, _, most = text.partition("-")
    first, last = int(least), int(most or least)
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"must be N or MIN-MAX with 1 <= MIN <= MAX, is {text!r}")
    return first, last
