"""How fast rows are whose output must match a JSON schema, through gRPC, beside the same batch without one.

Usage: python -m benchmarks.structured_output MODEL [--schema array] [--rows 64] [--pairs 5] [--out OUT_JSON]

The schemas (workloads.py) are those of arrays without an end, so every row makes all of its tokens. Scheduler and
worker are processes, and the worker records the times of its steps (traced_worker.py). A plain batch and one with the
schema go through the public API in pairs, one right after the other. Tokens per second are those of a whole batch, with
its prompts and the compilation of its grammars. A step's time is the interval between two results by the worker's
clock, where all rows decode. What the schema adds to it is how much longer it is than the plain batches' median.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    BenchmarkError,
    Engine,
    UnaryClient,
    add_engine_options,
    header,
    running_engine,
    write_json,
)
from benchmarks.gaps import Stretch, full_stretches, pairs
from benchmarks.traced_worker import TracedStep, read_trace
from benchmarks.workloads import SCHEMAS, fixed, reduced
from tandem.v1 import inference_pb2

PROMPT_LEN, OUTPUT_LEN = 128, 256
MARGIN = 8
"""Steps left out at either end of a stretch."""
LIMIT = 0.9
"""The least share of the plain batch's tokens per second."""


async def generate(
    engine: Engine, num_rows: int, arguments: argparse.Namespace
) -> dict[str, list[tuple[float, range]]]:
    """Runs the pairs, after one of each to warm up. Returns each batch's seconds and the ids of its steps."""
    prompt_len, output_len = reduced(PROMPT_LEN, arguments.scale), 1 + reduced(OUTPUT_LEN - 1, arguments.scale)
    schema = inference_pb2.StructuredOutput(json_schema=json.dumps(SCHEMAS[arguments.schema]))
    runs: dict[str, list[tuple[float, range]]] = {"plain": [], "schema": []}
    async with UnaryClient(engine.services.address, arguments.connections, arguments.sampling) as client:
        for pair in range(arguments.pairs + 1):
            for kind in runs if pair % 2 else reversed(runs):
                first = engine.counters()["num_steps"] + 1
                workload = fixed(num_rows, prompt_len, output_len, pair, engine.vocab_size)
                fields = {"structured_output": schema} if kind == "schema" else {}
                seconds, replies = await client.timed_replies(workload, **fields)
                texts = [reply.choices[0].text for reply in replies]
                if kind == "schema" and not all(text.startswith("[") for text in texts):
                    raise BenchmarkError(f"outputs that begin no array: {texts[:3]}")
                if pair:
                    runs[kind].append((seconds, range(first, engine.counters()["num_steps"] + 1)))
    return runs


def speeds(runs: dict[str, list[float]], num_tokens: int) -> dict[str, Any]:
    """Tokens per second of each kind of batch, and the share that is left with the schema, by pairs. runs: seconds."""
    ratios = [plain / schema for plain, schema in zip(runs["plain"], runs["schema"], strict=True)]
    rates = {f"{kind}_tok_s": round(num_tokens / statistics.median(seconds), 1) for kind, seconds in runs.items()}
    return rates | {
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "limit": LIMIT,
    }


def step_times(plain: list[Stretch], schema: list[Stretch]) -> dict[str, Any]:
    """Milliseconds of the steps of both kinds of batches, what the schema adds to a step, and how long the host takes
    for the grammars, which a GPU's forward pass may hide.
    """
    intervals = {"plain_ms": intervals_ms(plain), "schema_ms": intervals_ms(schema)}
    usual = float(np.median(intervals["plain_ms"]))
    return {kind: summary(values) for kind, values in intervals.items()} | {
        "added_ms": summary(value - usual for value in intervals["schema_ms"]),
        "grammars_ms": summary(step.grammars_duration_ns / 1e6 for stretch in schema for step in stretch),
    }


def intervals_ms(stretches: list[Stretch]) -> list[float]:
    return [(later.sampled_ns - step.sampled_ns) / 1e6 for step, later in pairs(stretches, 1)]


def summary(values: Iterable[float]) -> dict[str, float]:
    array = np.fromiter(values, dtype=float)
    numbers = {"mean": array.mean(), "p50": np.median(array), "p99": np.percentile(array, 99), "worst": array.max()}
    return {name: round(float(number), 3) for name, number in numbers.items()}


def stretches_of(steps: list[TracedStep], runs: list[range], num_rows: int, margin: int) -> list[Stretch]:
    """The stretches of these runs in which all rows decode. runs: the ids of their steps."""
    found = []
    for ids in runs:
        found += full_stretches([step for step in steps if step.step_id in ids], num_rows, margin, 2)
    if not found:
        raise BenchmarkError("too few steps in which all rows decode")
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the services. Returns what the report says beside its header."""
    num_rows, margin = reduced(arguments.rows, arguments.scale), reduced(MARGIN, arguments.scale)
    with tempfile.TemporaryDirectory(prefix="tandem-trace-") as folder:
        trace = Path(folder) / "steps.jsonl"
        with running_engine(arguments, ("benchmarks.traced_worker", str(trace))) as engine:
            runs = asyncio.run(generate(engine, num_rows, arguments))
        steps = read_trace(trace)
    stretches = {
        kind: stretches_of(steps, [ids for _, ids in batches], num_rows, margin) for kind, batches in runs.items()
    }
    num_tokens = num_rows * (1 + reduced(OUTPUT_LEN - 1, arguments.scale))
    report = engine.description | {"num_rows": num_rows, "num_tokens": num_tokens}
    report |= {name: getattr(arguments, name) for name in ("schema", "sampling", "scale", "connections", "pairs")}
    report |= speeds({kind: [seconds for seconds, _ in batches] for kind, batches in runs.items()}, num_tokens)
    return report | {"steps": step_times(**stretches)}


def table(report: dict[str, Any]) -> str:
    """Both kinds of batches, as a Markdown table."""
    lines = ["| batch | tok/s | step, ms: mean | p50 | p99 | worst |", "|---|---|---|---|---|---|"]
    for kind in ("plain", "schema"):
        step = report["steps"][f"{kind}_ms"]
        numbers = " | ".join(f"{step[name]:.2f}" for name in ("mean", "p50", "p99", "worst"))
        lines.append(f"| {kind} | {report[f'{kind}_tok_s']:,.0f} | {numbers} |")
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--schema", choices=SCHEMAS, default="array")
    parser.add_argument("--rows", type=int, default=64, help="sequences at once")
    parser.add_argument("--pairs", type=int, default=5, help="how often both kinds of batches run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(command_line)
    report = header("rows under a JSON schema, through gRPC, beside plain ones", arguments.commit) | measure(arguments)
    if arguments.out:
        write_json(arguments.out, report)
    print(f"{report['model']} on {report['device']}, {report['num_rows']} rows, scale 1/{report['scale']}")
    print(table(report))
    print(f"speed with the schema: {report['ratio']:.3f} of the plain batch's")
    print(f"added to a step, ms: {report['steps']['added_ms']}; grammars, ms: {report['steps']['grammars_ms']}")


if __name__ == "__main__":
    main()
