"""Measures models over several numbers of ranks, and reports how they scale.

Usage: python -m benchmarks.scaling [MODEL ...] [--tp-sizes N ...] [--results FOLDER] [FLAGS OF benchmarks.throughput]

For each model and number of ranks: benchmarks.throughput's rows, through gRPC; on GPUs also single steps by kernel
(benchmarks.step_times), and the all-reduces by message size (benchmarks.all_reduce). Each writes its own results file.
If a run fails, for example because a model does not fit, the others still run, and it is named at the end. Then, or at
once without a MODEL, FOLDER/scaling.json is written from what FOLDER holds.

Efficiency is the speed relative to the smallest number of ranks, divided by the ratio of the numbers of ranks.
Predictions come from benchmarks.scaling_model, if steps of two ranks were profiled.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.anchors import num_ranks
from benchmarks.checkpoint import SIZES
from benchmarks.common import RESULTS, SAMPLINGS, Report, newest, read_reports, shape_of, write_json
from benchmarks.scaling_model import DECODE_ROWS, PROFILED_RANKS, ScalingModel, parts_of_steps
from benchmarks.throughput import speed_ratio

ROWS = ("nano256", "decode_b1", "decode_b64", "decode_b256", "prefill_64x2048")
TP_SIZES = (1, 2, 4, 8)


def measure(models: list[str], tp_sizes: list[int], sampling: str, results: Path, flags: list[str]) -> list[str]:
    """Runs the measurements. Returns the commands that failed."""
    num_gpus = torch.cuda.device_count()
    if too_large := [size for size in tp_sizes if num_gpus and size > num_gpus]:
        print(f"not measured, as there are {num_gpus} GPUs: {too_large} ranks", flush=True)
        tp_sizes = [size for size in tp_sizes if size <= num_gpus]
    commands: list[tuple[list[str], str]] = []
    for model, size in itertools.product(models, tp_sizes):
        command = ["benchmarks.throughput", model, "--set", f"tp_size={size}", "--sampling", sampling, "--rows", *ROWS]
        commands.append(([*command, *flags], f"throughput_{Path(model).name}_tp{size}_{sampling}.json"))
    if num_gpus:
        for shape, size in itertools.product(filter(None, map(shape_of, models)), tp_sizes):
            command = ["benchmarks.step_times", shape, "--profile", "--rows", *map(str, DECODE_ROWS)]
            commands.append(([*_ranks(size), *command], f"step_times_{shape}_tp{size}.json"))
        for size in tp_sizes:
            if size > 1:
                commands.append(([*_ranks(size), "benchmarks.all_reduce"], f"all_reduce_{size}.json"))
    failed = []
    for arguments, name in commands:
        command = [*arguments, "--out", str(results / name)]
        text = f"python -m {' '.join(command)}"
        print(text, flush=True)
        if subprocess.run([sys.executable, "-m", *command]).returncode:
            failed.append(text)
    return failed


def _ranks(count: int) -> list[str]:
    """Arguments of Python that run a module in `count` processes."""
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--module"] if count > 1 else []


def report(results: Path) -> list[Report]:
    """A report for each model, device and sampling that was measured with several numbers of ranks."""
    runs = [run for _, run in read_reports(results, "throughput_*.json")]
    keys = [(run["shape"] or run["model"], run["device"], run["sampling"], run["scale"]) for run in runs]
    by_key = newest(((key, num_ranks(run)), run) for key, run in zip(keys, runs, strict=True))
    groups: dict[tuple[Any, ...], dict[int, Report]] = defaultdict(dict)
    for (key, size), run in by_key.items():
        groups[key][size] = run
    return [
        {
            **dict(zip(("name", "device", "sampling", "scale"), key, strict=True)),
            "measured": _measured(dict(sorted(group.items()))),
            "sum_share": _sum_shares(results, key[0], group),
            "predicted": _predicted(results, key[0]),
        }
        for key, group in sorted(groups.items())
        if len(group) > 1
    ]


def _measured(runs: Mapping[int, Report]) -> dict[str, Any]:
    """For each row, by the number of ranks: the median, and the efficiency."""
    base = min(runs)
    measured: dict[str, Any] = {}
    for size, run in runs.items():
        for name in ROWS:
            row, first = run["rows"].get(name), runs[base]["rows"].get(name)
            if row and first:
                efficiency = speed_ratio(name, row["median"], first["median"]) * base / size
                entry = {"median": row["median"], "efficiency": round(efficiency, 3), "commit": run["commit"]}
                measured.setdefault(name, {})[str(size)] = entry
    return measured


def _sum_shares(results: Path, name: str, sizes: Iterable[int]) -> dict[str, dict[str, float]]:
    """The share of the GPU's busy time that sums over the ranks take, by number of ranks and profiled step."""
    shares = {}
    for size in sizes:
        if size > 1 and (steps := _read(results / f"step_times_{name}_tp{size}.json")):
            shares[str(size)] = {step: round(parts.sum_share, 3) for step, parts in parts_of_steps(steps).items()}
    return shares


def _predicted(results: Path, name: str) -> dict[str, dict[str, float]]:
    """The predicted rows by number of ranks; empty if a measurement that they need is missing."""
    steps = _read(results / f"step_times_{name}_tp{PROFILED_RANKS}.json")
    all_reduce = _read(results / f"all_reduce_{PROFILED_RANKS}.json")
    if not steps or not all_reduce:
        return {}
    model = ScalingModel(steps, all_reduce, SIZES[name]["hidden_size"])
    return {str(size): {row: float(f"{value:.4g}") for row, value in model.rows(size).items()} for size in TP_SIZES}


def _read(path: Path) -> Report | None:
    return json.loads(path.read_text()) if path.exists() else None


def table(scaling: Report) -> str:
    """A table with a line for each row: measured medians with their efficiency, and predictions in brackets."""
    lines = [f"{scaling['name']} on {scaling['device']}, sampling {scaling['sampling']}, scale 1/{scaling['scale']}"]
    measured, predicted = scaling["measured"], scaling["predicted"]
    sizes = sorted({int(size) for row in measured.values() for size in row} | set(map(int, predicted)))
    lines.append(f"{'ranks':16}" + "".join(f"{size:>28}" for size in sizes))
    for name, row in measured.items():
        cells = []
        for size in map(str, sizes):
            cell = f"{row[size]['median']:,.4g} {row[size]['efficiency']:.0%}" if size in row else ""
            cells.append(cell + (f" ({predicted[size][name]:,.4g})" if size in predicted else ""))
        lines.append(f"{name:16}" + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="model folder, or 'embedded'")
    parser.add_argument("--tp-sizes", type=int, nargs="+", default=list(TP_SIZES), metavar="N")
    parser.add_argument("--sampling", choices=SAMPLINGS, default="temperature")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments, flags = parser.parse_known_args(command_line)
    failed = measure(arguments.models, arguments.tp_sizes, arguments.sampling, arguments.results, flags)
    scalings = report(arguments.results)
    write_json(
        arguments.results / "scaling.json", {"what": "speed over several numbers of ranks", "scalings": scalings}
    )
    for scaling in scalings:
        print(table(scaling))
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
