"""make demo: both services on free ports, a generation streamed to the terminal, its speed, and nothing left behind."""

import sys
import time

from shared.config import SchedulerSettings, WorkerSettings
from shared.errors import TandemError
from tandem.client import TandemClient
from tandem.processes import Services
from tandem.sampling_params import SamplingParams

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
            _stream(client)
    print("both services are stopped")


def _stream(client: TandemClient) -> None:
    params = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, seed=7, max_tokens=MAX_TOKENS, ignore_eos=True)
    started = time.perf_counter()
    arrivals, num_tokens = [], 0
    print(PROMPT, end="", flush=True)
    for delta in client.generate_stream(PROMPT, params):
        arrivals.append(time.perf_counter())
        num_tokens += len(delta.token_ids)
        print(delta.text_delta, end="", flush=True)
    first_s, decode_s = arrivals[0] - started, arrivals[-1] - arrivals[0]
    rate = (num_tokens - 1) / decode_s
    print(f"\n\n{num_tokens} tokens: TTFT {first_s * 1e3:.1f} ms, then {rate:.0f} tokens/s", flush=True)


def main() -> int:
    try:
        run_demo()
    except TandemError as error:
        print(f"tandem demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
