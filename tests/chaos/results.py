"""The results files of `make chaos`: one a part, written after each piece."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Report, git, header, write_json
from tests.chaos.part import Form, Found, Part, Row

FOLDER = RESULTS / "chaos"


class ChaosError(Exception):
    """A part that can't be run, or a results file that can't be used."""


def run_part(part: Part, form: Form, folder: Path, *, afresh: bool, commit: str | None = None) -> list[Row]:
    """Runs the pieces that the part's file lacks. afresh: all of them, whatever is there."""
    if reason := part.why_not():
        raise ChaosError(f"{part.name}: {reason}")
    path = folder / f"{part.name}.json"
    commit = commit or git("rev-parse", "HEAD")
    report = None if afresh else _load(path, form, commit)
    report = report or {**header(f"chaos: {part.name}", commit), "form": form.value, "pieces": []}
    done = [piece["asked"] for piece in report["pieces"]]
    for asked in part.pieces[form]:
        if dict(asked) in done:
            print(f"{part.name}: there already: {_describe(asked)}", flush=True)
            continue
        print(f"{part.name}: {_describe(asked)}", flush=True)
        report["pieces"].append({"asked": dict(asked), "found": part.run(**asked)})
        write_json(path, report)
    rows = part.rows(found_in(report))
    report["rows"] = [vars(row) for row in rows]
    write_json(path, report)
    return rows


def found_in(report: Report) -> list[Found]:
    return [piece["found"] for piece in report["pieces"]]


def _load(path: Path, form: Form, commit: str) -> Report | None:
    if not path.exists():
        return None
    report: Report = json.loads(path.read_text())
    if (report["form"], report["commit"]) != (form.value, commit):
        raise ChaosError(
            f"{path} is of the {report['form']} form at {report['commit'][:7]}, so it can't be gone on with at "
            f"{commit[:7]}: --afresh replaces it"
        )
    return report


def _describe(asked: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in asked.items())
