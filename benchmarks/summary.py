"""Writes the tables of documents that must follow from the results: those of docs/capacity.md, and of
docs/performance.md the summary at its head, and each commit of the files that it names.

Usage: python -m benchmarks.summary [--check]

--check: fails where a document differs instead.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import capacity_tables
from benchmarks.anchors import NANO_VLLM, VLLM, anchors_of
from benchmarks.common import REPOSITORY, RESULTS, Report, commit_in

DOCUMENT = REPOSITORY / "docs" / "performance.md"
FILES = {
    "0.6B, one GPU": "throughput_0.6b_temperature.json",
    "8B, one GPU": "throughput_8b_temperature.json",
    "8B, two GPUs": "throughput_8b_tp2_temperature.json",
}
"""The columns of the summary, and their results files"""
ROWS = {
    "nano256": "all of 256 requests, each with 100 to 1024 tokens in and out (nano256)",
    "decode_b1": "one step of 1 sequence, which gives it one token (decode_b1)",
    "decode_b64": "one step of 64 sequences (decode_b64)",
    "decode_b256": "one step of 256 sequences (decode_b256)",
    "ttft_1024": "the first token after a prompt of 1024 tokens (ttft_1024)",
    "prefill_64x2048": "prompt tokens, of 64 prompts of 2048 tokens (prefill_64x2048)",
}
NOT_MEASURED = "–"  # noqa: RUF001 (a dash)
FIRST_COLUMN = "Tandem / vLLM 0.24 / nano-vllm"


def speeds(folder: Path) -> str:
    """The summary: Tandem's medians beside the other engines' numbers."""
    reports = {column: json.loads((folder / name).read_text()) for column, name in FILES.items()}
    lines = [f"| {' | '.join([FIRST_COLUMN, *reports])} |", "|---|" + "---|" * len(reports)]
    for name, meaning in ROWS.items():
        lines.append(f"| {' | '.join([meaning, *(_cell(report, name) for report in reports.values())])} |")
    commits = list(map(commit_in, reports.values()))
    commits = [commit + _flag(commit, commits[0]) for commit in commits]
    return "\n".join([*lines, f"| {' | '.join(['commit of Tandem', *commits])} |"]) + "\n"


def commits(folder: Path, text: str) -> str:
    """The commit and the day of each results file that a text names; those without a commit are left out."""
    of_summary = commit_in(json.loads((folder / next(iter(FILES.values()))).read_text()))
    lines = ["| file | commit | day |", "|---|---|---|"]
    for name in sorted(set(re.findall(r"`(\w[\w.]*\.json)`", text))):
        path = folder / name
        report = json.loads(path.read_text()) if path.exists() else {}
        if commit := commit_in(report):
            lines.append(f"| {name} | {commit}{_flag(commit, of_summary)} | {report.get('date', '')[:10]} |")
    return "\n".join(lines) + "\n"


def _cell(report: Report, name: str) -> str:
    row = report["rows"].get(name)
    if row is None:
        return ""
    others = anchors_of(report).get(name, {})
    digits = 0 if row["unit"] == "tok/s" else 1 if name == "ttft_1024" else 2
    numbers = [f"{number:,.{digits}f}" if number else NOT_MEASURED for number in map(others.get, (VLLM, NANO_VLLM))]
    return f"**{row['median']:,.{digits}f}** / {' / '.join(numbers)} {row['unit']}"


def _flag(commit: str, of_summary: str) -> str:
    return "" if commit == of_summary else ", **another**"


PARTS: dict[str, Callable[[Path, str], str]] = {"summary": lambda folder, _: speeds(folder), "commits": commits}
DOCUMENTS = {DOCUMENT: PARTS, capacity_tables.DOCUMENT: capacity_tables.PARTS}


def filled(text: str, folder: Path, parts: Mapping[str, Callable[[Path, str], str]] = PARTS) -> str:
    """A document with its tables made anew."""
    for name, make in parts.items():
        begin, end = f"<!-- {name}: make bench-plot writes it -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the document has no place for {name}")
        text = before + begin + make(folder, text) + end + after
    return text


def main() -> int:
    """Exit status 1 if --check finds a difference."""
    is_check, status = sys.argv[1:] == ["--check"], 0
    for document, parts in DOCUMENTS.items():
        text = document.read_text()
        new = filled(text, RESULTS, parts)
        if not is_check:
            document.write_text(new)
        elif new != text:
            print(f"{document.name} differs from benchmarks/results; run make bench-plot", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
