"""What streams through the HTTP gateway lose against the same streams through gRPC.

Usage: python -m benchmarks.gateway MODEL [--out OUT_JSON]
       python -m benchmarks.gateway embedded --steady-step-ms 10

Before one engine stand its gRPC front ends and as many gateway processes (--http-workers). For each API, completions of
token ids and chats, runs through gRPC and through HTTP alternate. The two of a pair have the same lengths, seeds and
arrivals, and different prompts, so that none is in the prefix cache. First all requests of a run come at once, which
gives the ratio of tokens a second; then they come at --rate, which gives the times to the first token. Lengths are
drawn as nano256's are. With --steady-step-ms the worker computes nothing and takes that long a step (steady_worker.py),
so that a machine without a GPU has the load of one that has one.

The clients are those of `tandem bench`. CPU time is given in CPUs, for each kind of process.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    BenchmarkError,
    Engine,
    add_engine_options,
    header,
    running_engine,
    version_of,
    write_json,
)
from benchmarks.cpu_times import CpuTimes
from tandem.commands.connection import add_connection_flags
from tandem.commands.load.clients import LoadClients, Run
from tandem.commands.load.grpc_target import GrpcTarget
from tandem.commands.load.http_target import HttpTarget
from tandem.commands.load.workload import Ask, Workload
from tandem.latency import percentiles, summarize_streams
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.model_folder import ALL_FILES, resolve_model

MAX_TOKEN_ID = 10_000
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
WARM_UP_TOKENS = (16, 16)
PACKAGES = ("httptools", "uvicorn", "uvloop")
DEFAULT_HTTP_WORKERS = 4
"""As many as the scheduler has front ends by default, on a machine with 8 CPUs or more."""


class Comparison:
    """One API, measured through gRPC and through HTTP."""

    def __init__(
        self, clients: dict[str, LoadClients], cpu_times: CpuTimes, workload: Workload, first_run: int
    ) -> None:
        self._clients = clients
        self._cpu_times = cpu_times
        self._workload = workload
        self._next_run = first_run

    def warm_up(self, num_requests: int) -> None:
        short = dataclasses.replace(self._workload, output_length=WARM_UP_TOKENS)
        self._pair(short, num_requests, math.inf)

    def measure(self, num_pairs: int, num_requests: int, rate: float) -> dict[str, Any]:
        pairs = [self._pair(self._workload, num_requests, rate) for _ in range(num_pairs)]
        ratios = [pair["http"]["output_tok_s"] / pair["grpc"]["output_tok_s"] for pair in pairs]
        report: dict[str, Any] = {"rate": str(rate), "num_requests": num_requests}
        for api in self._clients:
            runs = [pair[api] for pair in pairs]
            streams = [stream for run in runs for stream in run.pop("streams")]
            report[api] = {
                "output_tok_s": statistics.median(run["output_tok_s"] for run in runs),
                "ttft_ms": percentiles(1e3 * stream.ttft for stream in streams),
                "runs": runs,
            }
        report["http_over_grpc_tok_s"] = {
            "median": round(statistics.median(ratios), 4),
            "pairs": [round(ratio, 4) for ratio in ratios],
        }
        medians = {api: report[api]["ttft_ms"]["p50"] for api in self._clients}
        report["ttft_p50_ms_longer"] = round(medians["http"] - medians["grpc"], 3)
        return report

    def _pair(self, workload: Workload, num_requests: int, rate: float) -> dict[str, dict[str, Any]]:
        """Runs the same requests through both. Which is first changes from pair to pair."""
        asks = workload.asks(num_requests, rate, self._next_run)
        self._next_run += 1
        order = ["grpc", "http"] if self._next_run % 2 else ["http", "grpc"]
        runs = {order[0]: self._run(order[0], asks)}
        runs[order[1]] = self._run(order[1], [_reversed(ask) for ask in asks])
        return runs

    def _run(self, api: str, asks: Sequence[Ask]) -> dict[str, Any]:
        cpu, started = self._cpu_times.read(), time.monotonic()
        run = self._clients[api].run(asks, lambda: None)
        elapsed = time.monotonic() - started
        used = {role: seconds - cpu[role] for role, seconds in self._cpu_times.read().items()}
        _check(run, asks)
        summary = summarize_streams(run.streams, run.started, math.inf, math.inf)
        num_messages = sum(len(stream.arrivals) for stream in run.streams)
        kept = ("elapsed_s", "output_tok_s", "ttft_ms", "itl_ms", "e2e_ms", "lateness_ms")
        return {
            "streams": run.streams,
            **{name: summary[name] for name in kept},
            "num_messages": num_messages,
            "max_client_cpu_share": round(run.max_cpu_share, 3),
            "cpus": {role: round(seconds / elapsed, 3) for role, seconds in used.items()},
            "cpu_us_per_message": {role: round(1e6 * seconds / num_messages, 1) for role, seconds in used.items()},
        }


def _reversed(ask: Ask) -> Ask:
    """The request with another prompt of the same length."""
    prompt = " ".join(reversed(ask.prompt.split())) if isinstance(ask.prompt, str) else ask.prompt[::-1]
    return dataclasses.replace(ask, prompt=prompt)


def _check(run: Run, asks: Sequence[Ask]) -> None:
    if run.errors:
        raise BenchmarkError(f"requests failed: {dict(run.errors)}")
    asked, got = sum(ask.num_output_tokens for ask in asks), sum(sum(stream.num_tokens) for stream in run.streams)
    if asked != got:
        raise BenchmarkError(f"asked for {asked} tokens, got {got}")


@contextlib.contextmanager
def _clients(engine: Engine, api: str, count: int) -> Iterator[dict[str, LoadClients]]:
    services = engine.services
    model = engine.client.model_info().model
    url = f"http://{services.http_address}{PATHS[api]}"
    http = HttpTarget(url, model, is_chat=api == "chat", has_extensions=True, api_key=None)
    with LoadClients(grpc_target(services.address, model), count) as grpc, LoadClients(http, count) as over_http:
        yield {"grpc": grpc, "http": over_http}


def grpc_target(address: str, model: str) -> GrpcTarget:
    parser = argparse.ArgumentParser()
    add_connection_flags(parser)
    return GrpcTarget(parser.parse_args(["--address", address]), model)


def _length(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    return int(least), int(most or least)


def line(api: str, measured: dict[str, Any]) -> str:
    grpc, http = measured["grpc"], measured["http"]
    cost = http["runs"][-1]["cpu_us_per_message"]["gateway"]
    return (
        f"{api}, rate {measured['rate']}: HTTP {http['output_tok_s']:,.0f} tok/s, gRPC {grpc['output_tok_s']:,.0f}, "
        f"ratio {measured['http_over_grpc_tok_s']['median']:.3f}; TTFT p50 {http['ttft_ms']['p50']:.1f} and "
        f"{grpc['ttft_ms']['p50']:.1f} ms; gateway {cost:.0f} us of CPU time a message"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--apis", nargs="+", choices=list(PATHS), default=list(PATHS))
    parser.add_argument("--steady-step-ms", type=float, help="steps of a worker that computes nothing")
    parser.add_argument("--http-workers", type=int, default=DEFAULT_HTTP_WORKERS, help="processes of the gateway")
    parser.add_argument("--clients", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)), help="processes")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs in which all requests come at once")
    parser.add_argument("--num-requests", type=int, default=256, help="requests of such a run")
    parser.add_argument("--rate", type=float, default=16.0, help="requests a second of the runs for TTFT")
    parser.add_argument("--rate-pairs", type=int, default=2, help="pairs of runs for TTFT")
    parser.add_argument("--num-rate-requests", type=int, default=48, help="requests of a run for TTFT")
    parser.add_argument("--input-len", type=_length, default=(100, 1024), metavar="MIN-MAX")
    parser.add_argument("--output-len", type=_length, default=(100, 1024), metavar="MIN-MAX")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser


def main(command_line: list[str] | None = None) -> None:
    arguments = _parser().parse_args(command_line)
    report = header("streams through HTTP beside streams through gRPC, in pairs", arguments.commit)
    report["versions"] |= {name: version_of(name) for name in PACKAGES}
    names = ("steady_step_ms", "http_workers", "clients", "pairs", "rate_pairs", "input_len", "output_len", "seed")
    report |= {name: getattr(arguments, name) for name in names}
    program: tuple[str, ...] = ("tandem_worker",)
    if arguments.steady_step_ms is not None:
        folder = resolve_model(arguments.model, ALL_FILES)
        program = ("benchmarks.steady_worker", str(arguments.steady_step_ms), str(folder))
    gateway = GatewaySettings(http_port=0, http_workers=arguments.http_workers, log_level="warning")
    with running_engine(arguments, program, gateway) as engine:
        report |= engine.description | {"apis": {}}
        cpu_times = CpuTimes(engine.services)
        for number, api in enumerate(arguments.apis):
            workload = Workload(
                arguments.input_len,
                arguments.output_len,
                min(engine.vocab_size, MAX_TOKEN_ID),
                0.6,
                arguments.seed,
                api == "chat",
            )
            with _clients(engine, api, arguments.clients) as clients:
                comparison = Comparison(clients, cpu_times, workload, first_run=1000 * number)
                comparison.warm_up(arguments.num_requests)
                plan = [
                    ("saturated", arguments.pairs, arguments.num_requests, math.inf),
                    ("moderate", arguments.rate_pairs, arguments.num_rate_requests, arguments.rate),
                ]
                found = report["apis"][api] = {}
                for name, *asked in plan:
                    found[name] = comparison.measure(*asked)
                    print(line(api, found[name]), flush=True)
    if arguments.out:
        write_json(arguments.out, report)


if __name__ == "__main__":
    main()
