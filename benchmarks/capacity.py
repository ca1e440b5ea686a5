"""What one scheduler process carries, and what its users see past that.

Usage: python -m benchmarks.capacity [--out OUT_JSON]

The worker computes nothing and takes --step-ms a step, whatever is in it (steady_worker.py), so the scheduler, its
front ends and the HTTP gateway are what is measured. The clients are those of `tandem bench`. Four kinds of load:

streams     so many streams at once, a new one whenever one ends; with each number of front-end processes, and through
            the gateway. Below its capacity each stream gets a token a step.
prompts     requests for one token, whose cost is that of a request and its prompt.
rates       requests that come at a rate, however slow the server is: where waiting times leave the ground.
overload    more requests at once than may run and wait: which answers come.

CPU time is counted for each kind of process. It says what a core carries, also on a machine with so few cores that
clients and server get in each other's way; the times that clients saw are those of such a machine alone.
"""

import argparse
import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, BenchmarkError, Engine, header, running_engine, write_json
from benchmarks.cpu_times import CpuTimes
from benchmarks.gateway import grpc_target
from tandem.commands.load.clients import LoadClients, Run
from tandem.commands.load.grpc_target import GrpcTarget
from tandem.commands.load.http_target import HttpTarget
from tandem.commands.load.workload import Ask, Workload
from tandem.latency import summarize_streams
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.model_folder import ALL_FILES, resolve_model

ROLES = ("scheduler", "front_ends", "gateway", "worker", "clients")
MAX_SEQUENCES = 1024
PROMPT_LEN, OUTPUT_LEN = 64, 128
RATE_PROMPT_LEN, RATE_OUTPUT_LEN = 256, 64
OVERLOAD = {"max_num_seqs": 64, "max_num_waiting": 64}
OVERLOAD_REQUESTS, OVERLOAD_OUTPUT_LEN = 512, 32
Prompt = tuple[str, int, int]
"""A kind, a length, and a number of requests."""
PROMPTS: tuple[Prompt, ...] = (
    ("ids", 128, 256), ("ids", 2048, 256), ("ids", 16384, 64), ("chat", 128, 256), ("chat", 1024, 128)
)  # fmt: skip


class Site:
    """Running services and clients of one kind, which measure loads."""

    def __init__(self, engine: Engine, clients: LoadClients) -> None:
        self._engine = engine
        self._clients = clients
        self._cpu_times = CpuTimes(engine.services)
        self._num_runs = 0

    def asks(self, prompt: tuple[str, int], output_len: int, count: int, rate: float = math.inf) -> list[Ask]:
        kind, length = prompt
        self._num_runs += 1
        lengths = ((length, length), (output_len, output_len))
        workload = Workload(*lengths, self._engine.vocab_size, 0.6, 0, is_chat=kind == "chat")
        return workload.asks(count, rate, self._num_runs)

    def measure(self, asks: Sequence[Ask], at_once: int | None = None) -> dict[str, Any]:
        """Runs a load, of which no request may fail. at_once: the most requests that run."""
        cpu, counters, started = self._cpu_times.read(), self._engine.counters(), time.monotonic()
        run = self._clients.run(asks, lambda: None, at_once)
        elapsed = time.monotonic() - started
        used = {role: seconds - cpu[role] for role, seconds in self._cpu_times.read().items() if role in ROLES}
        num_steps = self._engine.counters()["num_steps"] - counters["num_steps"]
        if run.errors:
            raise BenchmarkError(f"requests failed: {dict(run.errors)}")
        check_tokens(run, asks, len(asks))
        summary = summarize_streams(run.streams, run.started, math.inf, math.inf)
        num_tokens = sum(ask.num_output_tokens for ask in asks)
        kept = ("elapsed_s", "output_tok_s", "requests_s", "ttft_ms", "itl_ms")
        return {
            "num_requests": len(asks),
            "num_steps": num_steps,
            **{name: summary[name] for name in kept},
            "tokens_per_message": summary["tokens_per_message"]["mean"],
            "max_client_cpu_share": round(run.max_cpu_share, 3),
            "cpus": {role: round(seconds / elapsed, 3) for role, seconds in used.items()},
            "cpu_us_per_token": {role: round(1e6 * seconds / num_tokens, 2) for role, seconds in used.items()},
            "cpu_us_per_request": {role: round(1e6 * seconds / len(asks), 1) for role, seconds in used.items()},
            "cpu_us_per_step": {role: round(1e6 * seconds / num_steps, 1) for role, seconds in used.items()},
            "load_average": round(os.getloadavg()[0], 2),
        }

    def overload(self) -> dict[str, Any]:
        """Sends more requests at once than may run and wait."""
        asks = self.asks(("ids", PROMPT_LEN), OVERLOAD_OUTPUT_LEN, OVERLOAD_REQUESTS)
        run = self._clients.run(asks, lambda: None)
        check_tokens(run, asks, len(run.streams))
        refused: Counter[str] = Counter()
        for text, count in run.errors.items():
            refused[text.partition(":")[0]] += count
        return {**OVERLOAD, "num_requests": len(asks), "num_answered": len(run.streams), "refused": dict(refused)}


def check_tokens(run: Run, asks: Sequence[Ask], num_streams: int) -> None:
    """Raises BenchmarkError unless so many streams ended, each with all of its tokens, which is one number for all."""
    wrong = [sum(stream.num_tokens) for stream in run.streams if sum(stream.num_tokens) != asks[0].num_output_tokens]
    if wrong or len(run.streams) != num_streams:
        raise BenchmarkError(f"{len(run.streams)} of {num_streams} streams ended, {len(wrong)} with lost tokens")


@contextlib.contextmanager
def site(arguments: argparse.Namespace, front_ends: int, *, is_http: bool = False, **settings: int) -> Iterator[Site]:
    folder = resolve_model("embedded", ALL_FILES)
    given = {"max_num_seqs": MAX_SEQUENCES, "api_server_count": front_ends, **settings}
    gateway = GatewaySettings(http_port=0, log_level="warning") if is_http else None
    program = ("benchmarks.steady_worker", str(arguments.step_ms), str(folder))
    with running_engine(argparse.Namespace(model="embedded", set=list(given.items())), program, gateway) as engine:
        services, model = engine.services, engine.client.model_info().model
        target: GrpcTarget | HttpTarget
        if is_http:
            url = f"http://{services.http_address}/v1/completions"
            target = HttpTarget(url, model, is_chat=False, has_extensions=True, api_key=None)
        else:
            target = grpc_target(services.address, model)
        # The kernel deals connections out to the front ends, and each client has one.
        with LoadClients(target, max(arguments.clients, 2 * front_ends)) as clients:
            measured = Site(engine, clients)
            measured.measure(measured.asks(("ids", PROMPT_LEN), 8, 32))
            yield measured


def measure_streams(arguments: argparse.Namespace, measured: Site, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    for count in counts:
        asks = measured.asks(("ids", PROMPT_LEN), OUTPUT_LEN, max(count, arguments.num_requests))
        found = measured.measure(asks, at_once=count)
        offered = round(1000 * count / arguments.step_ms, 1)
        print(f"  {count} streams: {found['output_tok_s']:,.0f} of {offered:,.0f} tok/s, {found['cpus']}", flush=True)
        yield {"num_streams": count, "most_tok_s": offered, **found}


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"streams": [], "prompts": [], "rates": []}
    for front_ends in arguments.front_ends:
        print(f"{front_ends} front ends", flush=True)
        with site(arguments, front_ends) as measured:
            counts = arguments.streams if not front_ends else arguments.few_streams
            for found in measure_streams(arguments, measured, counts):
                report["streams"].append({"api": "gRPC", "front_ends": front_ends, **found})
            if front_ends:
                continue
            for kind, length, count in arguments.prompts:
                found = measured.measure(measured.asks((kind, length), 1, count))
                report["prompts"].append({"kind": kind, "length": length, **found})
            for rate in arguments.rates:
                count = max(1, round(rate * arguments.rate_s))
                found = measured.measure(measured.asks(("ids", RATE_PROMPT_LEN), RATE_OUTPUT_LEN, count, rate))
                report["rates"].append({"rate": rate, **found})
                print(f"  {rate:g} requests/s: TTFT {found['ttft_ms']}, gaps {found['itl_ms']}", flush=True)
    print("HTTP, 1 gateway process, 0 front ends", flush=True)
    with site(arguments, 0, is_http=True) as measured:
        for found in measure_streams(arguments, measured, arguments.http_streams):
            report["streams"].append({"api": "HTTP", "front_ends": 0, **found})
    with site(arguments, 0, **OVERLOAD) as measured:
        report["overload"] = measured.overload()
    return report


def parse_prompt(text: str) -> Prompt:
    """Parses KIND:LENGTH:REQUESTS."""
    kind, length, count = text.split(":")
    if kind not in ("ids", "chat"):
        raise ValueError(kind)
    return kind, int(length), int(count)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--front-ends", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="with 0 front ends")
    parser.add_argument("--few-streams", type=int, nargs="+", default=[64, 256, 1024], help="with more of them")
    parser.add_argument("--http-streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--num-requests", type=int, default=256, help="least requests of a number of streams")
    parser.add_argument("--prompts", type=parse_prompt, nargs="+", default=PROMPTS, metavar="KIND:LENGTH:REQUESTS")
    parser.add_argument("--rates", type=float, nargs="+", default=[25, 50, 100, 200, 400], help="requests a second")
    parser.add_argument("--rate-s", type=float, default=4.0, help="how long requests come at a rate")
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--commit", help="the commit that is measured; git is asked by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "capacity_cpu.json")
    arguments = parser.parse_args(command_line)
    report = header("what one scheduler carries, before a worker that computes nothing", arguments.commit)
    report |= {
        "step_ms": arguments.step_ms,
        "prompt_len": PROMPT_LEN,
        "output_len": OUTPUT_LEN,
        "rate_prompt_len": RATE_PROMPT_LEN,
        "rate_output_len": RATE_OUTPUT_LEN,
        "clients": arguments.clients,
    }
    report |= measure_all(arguments)
    write_json(arguments.out, report)


if __name__ == "__main__":
    main()
