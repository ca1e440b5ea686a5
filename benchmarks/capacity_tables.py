"""The tables of docs/capacity.md, from the results of benchmarks.capacity. benchmarks.summary writes them."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.common import REPOSITORY, Report, commit_in

DOCUMENT = REPOSITORY / "docs" / "capacity.md"
RESULTS_FILE = "capacity_cpu.json"
TYPICAL_STREAMS = 256
"""The number of streams at which a core's share is told: --max-num-seqs by default."""


def cores(report: Report) -> str:
    """What one core carries in each kind of process: the inverse of the CPU time that a token took there."""
    alone, over_http = _streams(report, "gRPC", 0), _streams(report, "HTTP", 0)
    apart = _streams(report, "gRPC", min(row["front_ends"] for row in report["streams"] if row["front_ends"]))
    needed = f"cores for {TYPICAL_STREAMS} streams with a token every {report['step_ms']:g} ms"
    rows = []
    for name, row, role in (
        ("scheduler, without front ends", alone, "scheduler"),
        ("scheduler, with front ends", apart, "scheduler"),
        ("front ends", apart, "front_ends"),
        ("HTTP gateway", over_http, "gateway"),
    ):
        cost = row["cpu_us_per_token"][role]
        rows.append((name, f"{cost:.0f} µs", _a_second(cost), f"{cost * row['most_tok_s'] / 1e6:.1f}"))
    return _table(("process", "CPU time a token", "tokens/s of a core", needed), rows)


def streams(report: Report) -> str:
    heads = ("API", "front ends", "streams", "tokens/s", "of at most", "gap p50 / p99", "first token p50")
    cpus = ("CPU time a token: scheduler", "front ends", "gateway")
    rows = [
        (
            row["api"], row["front_ends"], row["num_streams"],
            f"{row['output_tok_s']:,.0f}", f"{row['most_tok_s']:,.0f}",
            f"{row['itl_ms']['p50']:.0f} / {row['itl_ms']['p99']:.0f} ms", f"{row['ttft_ms']['p50']:,.0f} ms",
            *(_cost(row, role) for role in ("scheduler", "front_ends", "gateway")),
        )
        for row in report["streams"]
    ]  # fmt: skip
    return _table((*heads, *cpus), rows)


def prompts(report: Report) -> str:
    heads = ("prompt", "CPU time of scheduler and front ends", "requests a second that a core carries")
    rows = []
    for row in report["prompts"]:
        used = row["cpu_us_per_request"]
        cost = used["scheduler"] + used["front_ends"]
        unit = "token ids" if row["kind"] == "ids" else "words of a chat"
        rows.append((f"{row['length']:,} {unit}", f"{cost / 1000:.1f} ms", _a_second(cost)))
    return _table(heads, rows)


def rates(report: Report) -> str:
    heads = ("requests/s", "first token p50 / p99", "gap p50 / p99", "tokens/s")
    rows = [
        (
            f"{row['rate']:g}", f"{row['ttft_ms']['p50']:,.0f} / {row['ttft_ms']['p99']:,.0f} ms",
            f"{row['itl_ms']['p50']:.0f} / {row['itl_ms']['p99']:.0f} ms", f"{row['output_tok_s']:,.0f}",
        )
        for row in report["rates"]
    ]  # fmt: skip
    return _table(heads, rows)


def overload(report: Report) -> str:
    found = report["overload"]
    rows = [("answered, with all of their tokens", found["num_answered"]), *sorted(found["refused"].items())]
    heads = (f"of {found['num_requests']} requests at once", "number")
    return _table(heads, rows)


def machine(report: Report) -> str:
    loads = [row["load_average"] for row in report["streams"]]
    most = max(row["cpus"].get(role, 0) for row in report["streams"] for role in ("scheduler", "gateway"))
    versions, where = report["versions"], f"{report['num_cpus']} CPUs ({report['cpu']})"
    return (
        f"Measured on {where}, which clients and server shared: the\n"
        f"load average was {min(loads):.0f} to {max(loads):.0f}, and neither scheduler nor gateway got more than "
        f"{most:.1f} of a core. Steps of {report['step_ms']:g} ms;\n"
        f"prompts of {report['prompt_len']} tokens and outputs of {report['output_len']}, at rates "
        f"{report['rate_prompt_len']} and {report['rate_output_len']}. Commit {commit_in(report)} of "
        f"{report['date'][:10]}, Python\n{versions['python']}, grpcio {versions['grpcio']}.\n"
    )


def _streams(report: Report, api: str, front_ends: int) -> Report:
    [row] = (
        row
        for row in report["streams"]
        if (row["api"], row["front_ends"], row["num_streams"]) == (api, front_ends, TYPICAL_STREAMS)
    )
    return row


def _cost(row: Report, role: str) -> str:
    cost = row["cpu_us_per_token"].get(role, 0)
    return f"{cost:.0f} µs" if cost else ""


def _a_second(cost_us: float) -> str:
    """The number of things that take so much CPU time each which a core does in a second, to two digits."""
    return f"{float(f'{1e6 / cost_us:.2g}'):,.0f}"


def _table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _from_file(make: Callable[[Report], str]) -> Callable[[Path, str], str]:
    return lambda folder, _: make(json.loads((folder / RESULTS_FILE).read_text()))


PARTS = {make.__name__: _from_file(make) for make in (machine, cores, streams, rates, prompts, overload)}
