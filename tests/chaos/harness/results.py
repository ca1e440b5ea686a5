"""The results files of `make chaos`: one for each part, written after each piece."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Report, git, header, write_json
from tests.chaos.harness.definitions import Form, Found, Part, Row

FOLDER = RESULTS / "chaos"


class ChaosError(Exception):
    """A part that cannot be run, or a results file that cannot be used."""


def run_part(
    part: Part,
    form: Form,
    folder: Path,
    *,
    afresh: bool,
    commit: str | None = None,
    only: Collection[int] | None = None,
) -> list[Row]:
    """Runs the pieces that the part's file lacks. afresh: runs all, and replaces the file. only: indexes of the pieces
    to run.
    """
    if reason := part.why_not():
        raise ChaosError(f"{part.name}: {reason}")
    asked_for = _asked(part, form)
    if unknown := set(only or ()) - set(range(len(asked_for))):
        raise ChaosError(f"{part.name} has {len(asked_for)} pieces, so none with the index {max(unknown)}")
    path = folder / f"{part.name}.json"
    commit = commit or git("rev-parse", "HEAD")
    report = None if afresh else _load(path, form, commit)
    report = report or {**header(f"chaos: {part.name}", commit), "form": form.value, "pieces": []}
    done = [piece["asked"] for piece in report["pieces"]]
    for index, asked in enumerate(asked_for):
        if only is not None and index not in only:
            continue
        if asked in done:
            print(f"{part.name}: there already: {_describe(asked)}", flush=True)
            continue
        print(f"{part.name}: {_describe(asked)}", flush=True)
        report["pieces"].append({"asked": asked, "found": part.run(**asked)})
        write_json(path, report)
    return _write(part, path, report)


def join(part: Part, form: Form, folders: Sequence[Path], folder: Path, *, commit: str | None = None) -> list[Row]:
    """Joins the part's files of several folders, whose pieces differ, into one, which replaces that in `folder`."""
    commit = commit or git("rev-parse", "HEAD")
    reports = [report for source in folders if (report := _load(source / f"{part.name}.json", form, commit))]
    if not reports:
        raise ChaosError(f"no folder has {part.name}.json")
    asked = _asked(part, form)
    pieces = [piece for report in reports for piece in report["pieces"]]
    for piece in pieces:
        if piece["asked"] not in asked or sum(piece["asked"] == other["asked"] for other in pieces) > 1:
            raise ChaosError(f"a piece of {part.name} is there twice, or is no longer one: {_describe(piece['asked'])}")
    pieces.sort(key=lambda piece: asked.index(piece["asked"]))
    return _write(part, folder / f"{part.name}.json", {**reports[0], "pieces": pieces})


def found_in(report: Report) -> list[Found]:
    return [piece["found"] for piece in report["pieces"]]


def _write(part: Part, path: Path, report: Report) -> list[Row]:
    rows = part.rows(found_in(report))
    report["rows"] = [vars(row) for row in rows]
    write_json(path, report)
    return rows


def _asked(part: Part, form: Form) -> list[dict[str, Any]]:
    """The keywords of each piece, in the types that a file gives back."""
    pieces: list[dict[str, Any]] = json.loads(json.dumps([dict(asked) for asked in part.pieces[form]]))
    return pieces


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
