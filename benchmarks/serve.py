"""An open-loop load generator: streams start when they are due, however slow the server is.

Usage: python -m benchmarks.serve MODEL --rates 8 16 inf [--out OUT_JSON]
       python -m benchmarks.serve MODEL --compare-unary [--out OUT_JSON]

Arrivals are a Poisson process, lengths are those of nano256, and each client is a process with one connection. With the
rate 'inf' all requests arrive at once.
--compare-unary runs the same requests all at once through Generate and through GenerateStream, in turn, and gives the
ratio of their throughputs. benchmarks/latency.py defines what is reported.
"""

import argparse
import asyncio
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    Engine,
    UnaryClient,
    add_engine_options,
    header,
    request_fields,
    running_engine,
    write_json,
)
from benchmarks.latency import LoadSample, summarize
from benchmarks.stream_clients import Arrival, Run, StreamClients
from benchmarks.workloads import Workload, nano256, shortened
from tandem.v1 import inference_pb2

POLL_S = 0.1


def arrival_times(num_requests: int, rate: float, seed: int) -> list[float]:
    """Seconds since the start, of a Poisson process of `rate` a second; all 0 if that is infinite."""
    if math.isinf(rate):
        return [0.0] * num_requests
    return list(np.random.default_rng(seed).exponential(1 / rate, num_requests).cumsum())


class Load:
    """One workload, to be run as streams or as unary calls."""

    def __init__(self, engine: Engine, clients: StreamClients, arguments: argparse.Namespace) -> None:
        self._engine = engine
        self._clients = clients
        self._arguments = arguments
        self.workload: Workload = shortened(nano256(arguments.num_requests, engine.vocab_size), arguments.scale)
        self.samples: list[LoadSample] = []

    def stream(self, rate: float) -> Run:
        times = arrival_times(len(self.workload[0]), rate, self._arguments.seed)
        arrivals = [
            Arrival(inference_pb2.GenerateStreamRequest(**fields).SerializeToString(), num_tokens, after_s)
            for fields, num_tokens, after_s in zip(
                request_fields(self.workload, self._arguments.sampling), self.workload[1], times, strict=True
            )
        ]
        self.samples = []
        return self._clients.run(arrivals, self._sample, POLL_S)

    def measure(self, rate: float) -> dict[str, Any]:
        before = self._engine.counters()
        run = self.stream(rate)
        report = summarize(
            run.streams,
            self.samples,
            run.started,
            self._arguments.slo_ttft_ms / 1e3,
            self._arguments.slo_tpot_ms / 1e3,
        )
        load = {name: count - before[name] for name, count in self._engine.counters().items()}
        return {"rate": str(rate), **report, "max_client_cpu_share": round(run.max_cpu_share, 3), "load": load}

    async def compare_unary(self, repeats: int) -> dict[str, Any]:
        """Measures unary and streamed calls in turn, each warmed up once."""
        seconds: dict[str, list[float]] = {"unary": [], "stream": []}
        arguments = self._arguments
        async with UnaryClient(self._engine.services.address, arguments.connections, arguments.sampling) as client:
            for repeat in range(1 + repeats):
                unary = await client.seconds(self.workload)
                run = self.stream(math.inf)
                stream = max(stream.ended for stream in run.streams) - run.started
                if repeat > 0:
                    seconds["unary"].append(unary)
                    seconds["stream"].append(stream)
        num_tokens = sum(self.workload[1])
        rates = {name: num_tokens / statistics.median(values) for name, values in seconds.items()}
        return {
            "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
            "output_tok_s": {name: round(rate, 1) for name, rate in rates.items()},
            "stream_over_unary": round(rates["stream"] / rates["unary"], 4),
            "max_client_cpu_share": round(run.max_cpu_share, 3),
        }

    def _sample(self) -> None:
        load = self._engine.client.load()
        self.samples.append(LoadSample(time.monotonic(), load.num_steps, load.num_running_sequences))


def line(measured: dict[str, Any]) -> str:
    parts = [f"rate {measured['rate']}: {measured['output_tok_s']:,} tok/s, goodput {measured['goodput']['share']:.0%}"]
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        parts.append(f"{name} {' / '.join(f'{value:.1f}' for value in measured[name].values())}")
    parts.append(f"late by {measured['lateness_ms']['p99']:.1f} ms at p99")
    return "; ".join(parts)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--rates", type=float, nargs="+", default=[math.inf], help="requests a second, or inf")
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--clients", type=int, default=8, help="client processes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the arrivals")
    parser.add_argument("--slo-ttft-ms", type=float, default=500.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=30.0)
    parser.add_argument("--compare-unary", action="store_true", help="instead of --rates")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of --compare-unary")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(command_line)
    report = header("streams through gRPC, open loop, scheduler and worker as processes", arguments.commit)
    names = ("sampling", "scale", "num_requests", "clients", "seed", "slo_ttft_ms", "slo_tpot_ms")
    with running_engine(arguments) as engine, StreamClients(engine.services.address, arguments.clients) as clients:
        report |= engine.description
        report |= {name: getattr(arguments, name) for name in names}
        load = Load(engine, clients, arguments)
        if arguments.compare_unary:
            report["compare_unary"] = asyncio.run(load.compare_unary(arguments.repeats))
            print(report["compare_unary"])
        else:
            load.stream(math.inf)  # warm-up
            report["rates"] = []
            for rate in arguments.rates:
                report["rates"].append(load.measure(rate))
                print(line(report["rates"][-1]), flush=True)
    if arguments.out:
        write_json(arguments.out, report)


if __name__ == "__main__":
    main()
