"""Measures a server at each rate, shows progress and a table, and writes the result."""

import argparse
import datetime
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tandem.commands.load.clients import LoadClients, Run
from tandem.commands.load.target import Target
from tandem.commands.load.workload import Workload
from tandem.latency import summarize_streams
from tandem_shared import VERSION
from tandem_shared.errors import TandemError

BUSY_CLIENT = 0.9
"""The share of one CPU above which a client may be what limits a run."""


def measure(target: Target, workload: Workload, options: argparse.Namespace) -> int:
    """Returns the exit status: 1 if requests failed. The table goes to stdout, everything else to stderr."""
    console = Console(stderr=True, highlight=False, markup=False)
    report: dict[str, Any] = {
        **target.description(),
        "tandem_version": VERSION,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "workload": {
            **asdict(workload),
            "num_prompts": options.num_prompts,
            "clients": options.clients,
            "max_concurrency": options.max_concurrency,
        },
        "slo_ms": {"ttft": options.slo_ttft_ms, "tpot": options.slo_tpot_ms},
        "rates": [],
    }
    has_failed = False
    with LoadClients(target, options.clients) as clients, Progress(console=console) as progress:
        if options.num_warmups:
            warmup = clients.run(
                workload.asks(options.num_warmups, float("inf"), 0), lambda: None, options.max_concurrency
            )
            _check(warmup, console)
        for index, rate in enumerate(options.request_rate, 1):
            task = progress.add_task(f"rate {rate:g}", total=options.num_prompts)
            run = clients.run(
                workload.asks(options.num_prompts, rate, index),
                lambda task=task: progress.advance(task),  # type: ignore[misc]
                options.max_concurrency,
            )
            has_failed |= not _check(run, console)
            summary = summarize_streams(run.streams, run.started, options.slo_ttft_ms / 1e3, options.slo_tpot_ms / 1e3)
            report["rates"].append(
                {
                    "rate": str(rate),
                    "num_completed": len(run.streams),
                    "errors": dict(run.errors),
                    **summary,
                    "max_client_cpu_share": round(run.max_cpu_share, 3),
                }
            )
            if run.max_cpu_share > BUSY_CLIENT:
                console.print(f"rate {rate:g}: a client used {run.max_cpu_share:.0%} of a CPU; try more --clients")
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(_table(report))
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(has_failed)


def _check(run: Run, console: Console) -> bool:
    """Whether all requests were answered. Says what failed. Raises TandemError if nothing was answered."""
    if run.errors:
        console.print(f"{run.errors.total()} requests failed. The most common errors, and how often each came:")
    for error, count in run.errors.most_common(3):
        console.print(f"{count}  {error}")
    if not run.streams:
        raise TandemError("no request was answered")
    return not run.errors


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['model']} at {report['server']} ({report['api']}); times in ms, p50 / p99")
    for name in ("rate", "done", "failed", "requests/s", "output tok/s", "goodput", "TTFT", "ITL", "TPOT", "E2E"):
        table.add_column(name, justify="right")
    for rate in report["rates"]:
        times = (rate[name] for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"))
        table.add_row(
            f"{float(rate['rate']):g}",
            str(rate["num_completed"]),
            str(sum(rate["errors"].values())),
            f"{rate['requests_s']:.2f}",
            f"{rate['output_tok_s']:,.0f}",
            f"{rate['goodput']['share']:.0%}",
            *(f"{each['p50']:,.1f} / {each['p99']:,.1f}" if each else "" for each in times),
        )
    return table
