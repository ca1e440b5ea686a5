"""Shows a generation in a terminal while it runs, and measures its speed."""

import time

from tandem.calls import Prompt
from tandem.client import TandemClient
from tandem.sampling_params import SamplingParams


def stream_text(client: TandemClient, prompt: Prompt, params: SamplingParams, timeout_s: float | None = None) -> str:
    """Prints the output's text as it arrives; returns a line that says how fast it came. After timeout_s seconds the
    server drops the request.
    """
    started = first_at = last_at = time.perf_counter()
    num_tokens = num_first = 0
    for delta in client.generate_stream(prompt, params, timeout_s=timeout_s):
        last_at = time.perf_counter()
        if not num_tokens:
            first_at, num_first = last_at, len(delta.token_ids)
        num_tokens += len(delta.token_ids)
        print(delta.text_delta, end="", flush=True)
    speed = f"{num_tokens} tokens: TTFT {(first_at - started) * 1e3:.1f} ms"
    # The time before the first message is the TTFT, so that message's tokens are left out of the rate.
    if num_tokens > num_first:
        speed += f", then {(num_tokens - num_first) / (last_at - first_at):.0f} tokens/s"
    return speed
