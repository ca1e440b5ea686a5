"""The command `tandem demo`: starts both services on free ports, streams one generation to the terminal, stops them."""

import argparse
import signal
from typing import Any

from tandem.client import TandemClient
from tandem.commands.terminal import stream_text
from tandem.processes import Services
from tandem.sampling_params import SamplingParams
from tandem_shared.config import SchedulerSettings, WorkerSettings

PROMPT = "ROMEO:\n"
MAX_TOKENS = 200
STARTUP_TIMEOUT_S = 120.0


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="start both services, stream text from the package's own model, stop them"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the services' addresses, the generated text and its speed. Raises what Services raises."""
    # SIGTERM, like Ctrl-C, stops the services and removes their temporary folder.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    services = Services(WorkerSettings(port=0, log_level="warning"), SchedulerSettings(port=0, log_level="warning"))
    print("starting the worker and the scheduler service with the embedded model ...", flush=True)
    with services:
        services.wait_until_ready(STARTUP_TIMEOUT_S)
        print(f"worker at {services.worker_address}, scheduler at {services.address}\n", flush=True)
        with TandemClient(services.address) as client:
            # A process's first request takes longer, as some things are made when they are first used.
            client.generate(PROMPT, SamplingParams(max_tokens=2))
            client.reset_prefix_cache()
            params = SamplingParams(
                temperature=0.8, top_k=50, top_p=0.95, seed=7, max_tokens=MAX_TOKENS, ignore_eos=True
            )
            print(PROMPT, end="", flush=True)
            print(f"\n\n{stream_text(client, PROMPT, params)}", flush=True)
    print("both services are stopped")
    return 0
