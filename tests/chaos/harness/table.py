"""The table in docs/reliability.md, made from the results files."""

import json
from pathlib import Path

from benchmarks.common import REPOSITORY
from tests.chaos.harness.definitions import Part, Row
from tests.chaos.harness.results import found_in

DOCUMENT = REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- table: make chaos writes it -->", "<!-- end of the table -->"


def table(parts: tuple[Part, ...], folder: Path) -> str:
    """The table in Markdown. Its rows are computed anew from what the pieces found."""
    lines = ["| what is promised | what was tried | what was found | |", "|---|---|---|---|"]
    for part in parts:
        path = folder / f"{part.name}.json"
        if not path.exists():
            continue
        report = json.loads(path.read_text())
        source = f"[{part.name}](../{path.relative_to(REPOSITORY)})"
        lines += [_line(row, source) for row in part.rows(found_in(report))]
    return "\n".join(lines) + "\n"


def fill(text: str, content: str) -> str:
    """The document `text` with its table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{content}{END}{after}"


def _line(row: Row, source: str) -> str:
    verdict = "met" if row.is_met else "**not met**"
    return f"| {row.promise} | {row.tried} | {row.found} | {verdict}, {source} |"
