"""make demo: both services on free ports, a generation streamed to the terminal, its speed, and nothing left behind."""

import sys

from tandem.client import TandemClient
from tandem.processes import Services
from tandem.sampling_params import SamplingParams
from tandem.terminal import stream_text
from tandem_shared.config import SchedulerSettings, WorkerSettings

PROMPT = "ROMEO:\n"
MAX_TOKENS = 200
STARTUP_TIMEOUT_S = 120.0


def run_demo() -> None:
    print("starting the worker and the scheduler service with the embedded model ...", flush=True)
    worker = WorkerSettings(port=0, log_level="warning")
    scheduler = SchedulerSettings(port=0, log_level="warning")
    with Services(worker, scheduler) as services:
        services.wait_until_ready(STARTUP_TIMEOUT_S)
        print(f"worker at {services.worker_address}, scheduler at {services.address}\n", flush=True)
        with TandemClient(services.address) as client:
            # The first request of a process pays for what is made on first use.
            client.generate(PROMPT, SamplingParams(max_tokens=2))
            client.reset_prefix_cache()
            params = SamplingParams(
                temperature=0.8, top_k=50, top_p=0.95, seed=7, max_tokens=MAX_TOKENS, ignore_eos=True
            )
            print(PROMPT, end="", flush=True)
            print(f"\n\n{stream_text(client, PROMPT, params)}", flush=True)
    print("both services are stopped")


if __name__ == "__main__":
    from tandem.cli import main

    sys.exit(main(["demo"]))
