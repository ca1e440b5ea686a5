"""The speed table: batches submitted at once through the public gRPC API, scheduler and worker as processes.

Usage: python -m benchmarks.throughput MODEL [--rows nano256 decode_b1 ...] [--sampling qwen3] [--out OUT_JSON]

The services are warmed up once; each row is repeated, and its median reported. Prefix caching is on, and each batch has
a cache salt of its own: a reply with cached tokens, or with another number of tokens than asked for, fails the run.
"""

import argparse
import asyncio
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.anchors import FLOOR, NANO_VLLM, VLLM, anchors_of
from benchmarks.common import Engine, UnaryClient, add_engine_options, header, running_engine, write_json
from benchmarks.workloads import Workload, fixed, nano256, reduced, shortened

DECODE_PROMPT_LEN, DECODE_STEPS = 512, 256
TTFT_RUNS = 8


@dataclass(frozen=True)
class Bench:
    """What a row needs to run: a function that times a batch, the size of the vocabulary, and the scale."""

    seconds: Callable[[Workload], Awaitable[float]]
    vocab_size: int
    scale: int

    async def fixed(self, num_seqs: int, prompt_len: int, output_len: int, seed: int) -> float:
        """Seconds of a batch whose sizes are already scaled."""
        return await self.seconds(fixed(num_seqs, prompt_len, output_len, seed, self.vocab_size))


async def nano256_seconds(bench: Bench, repeat: int) -> float:
    return await bench.seconds(shortened(nano256(256, bench.vocab_size), bench.scale))


async def decode_ms(bench: Bench, repeat: int, *, num_seqs: int) -> float:
    """Milliseconds of a decode step, from the extra time of DECODE_STEPS more tokens."""
    num_seqs, prompt_len = reduced(num_seqs, bench.scale), reduced(DECODE_PROMPT_LEN, bench.scale)
    num_steps = reduced(DECODE_STEPS, bench.scale)
    long = await bench.fixed(num_seqs, prompt_len, 1 + num_steps, 2 * repeat + 1)
    short = await bench.fixed(num_seqs, prompt_len, 1, 2 * repeat + 2)
    return (long - short) / num_steps * 1e3


async def ttft_ms(bench: Bench, repeat: int) -> float:
    seeds = range(TTFT_RUNS * repeat + 1, TTFT_RUNS * (repeat + 1) + 1)
    return statistics.median([await bench.fixed(1, reduced(1024, bench.scale), 1, seed) for seed in seeds]) * 1e3


async def prefill_rate(bench: Bench, repeat: int) -> float:
    num_seqs, prompt_len = reduced(64, bench.scale), reduced(2048, bench.scale)
    return num_seqs * prompt_len / await bench.fixed(num_seqs, prompt_len, 1, repeat + 1)


# Unit, and what measures one repeat. Rows in tok/s are better when higher, the others when lower.
ROWS: dict[str, tuple[str, Callable[[Bench, int], Awaitable[float]]]] = {
    "nano256": ("s", nano256_seconds),
    "decode_b1": ("ms", partial(decode_ms, num_seqs=1)),
    "decode_b64": ("ms", partial(decode_ms, num_seqs=64)),
    "decode_b256": ("ms", partial(decode_ms, num_seqs=256)),
    "ttft_1024": ("ms", ttft_ms),
    "prefill_64x2048": ("tok/s", prefill_rate),
}


def speed_ratio(row: str, value: float, reference: float) -> float:
    """How many times as fast as the reference: rates are better when higher, times when lower."""
    return value / reference if row.startswith("prefill") else reference / value


async def measure(engine: Engine, arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds the rows to the report, which is written after each, so that an interrupted run leaves what it has."""
    rows = report["rows"] = {}
    async with UnaryClient(engine.services.address, arguments.connections, arguments.sampling) as client:
        bench = Bench(client.seconds, engine.vocab_size, arguments.scale)
        await decode_ms(bench, 0, num_seqs=64)
        for name in arguments.rows:
            unit, measure_once = ROWS[name]
            before = engine.counters()
            repeats = [await measure_once(bench, 1 + repeat) for repeat in range(arguments.repeats)]
            rows[name] = {
                "median": round(statistics.median(repeats), 4),
                "unit": unit,
                "repeats": [round(value, 4) for value in repeats],
                "load": {counter: count - before[counter] for counter, count in engine.counters().items()},
            }
            if name == "nano256":
                num_tokens = sum(shortened(nano256(), arguments.scale)[1])
                rows[name] |= {"output_tok_s": round(num_tokens / statistics.median(repeats), 1)}
            if arguments.out:
                write_json(arguments.out, report)
            print(f"{name}: {rows[name]['median']} {unit}, {rows[name]['repeats']}, {rows[name]['load']}", flush=True)


def table(report: dict[str, Any]) -> str:
    """A table of the rows, beside the anchors if there are any."""
    anchors = anchors_of(report)
    others = (VLLM, NANO_VLLM, FLOOR) if anchors else ()
    lines = [f"{'':16}{'unit':>6}" + "".join(f"{name:>11}" for name in ("Tandem", *others))]
    for name, row in report["rows"].items():
        numbers = [row["median"], *(anchors.get(name, {}).get(other) for other in others)]
        texts = ["" if number is None else f"{number:,.{0 if row['unit'] == 'tok/s' else 2}f}" for number in numbers]
        lines.append((f"{name:16}{row['unit']:>6}" + "".join(f"{text:>11}" for text in texts)).rstrip())
        if "output_tok_s" in row:
            lines.append(f"{'':16}{'tok/s':>6}{row['output_tok_s']:>11,.0f}")
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(command_line)
    report = header("batches through gRPC, scheduler and worker as processes", arguments.commit)
    with running_engine(arguments) as engine:
        report |= engine.description
        report |= {name: getattr(arguments, name) for name in ("sampling", "scale", "connections")}
        print(f"{engine.description}", flush=True)
        asyncio.run(measure(engine, arguments, report))
    print(f"{report['model']} on {report['device']}, sampling {report['sampling']}, scale 1/{report['scale']}")
    print(table(report))


if __name__ == "__main__":
    main()
