"""The results files of the chaos harness: which pieces run again, joining files, refusals, and the table."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.harness import results, table
from tests.chaos.harness.definitions import Form, Part, Row
from tests.chaos.harness.results import ChaosError, join, run_part

COMMIT = "a" * 40


class Pieces:
    """A part of three pieces that records which ones it ran."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.part = Part("quake", self._run, self._rows, {Form.FULL: [{"size": (n, n)} for n in range(3)]})

    def _run(self, size: list[int]) -> dict[str, Any]:
        if size[0] in self.ran:
            raise AssertionError("twice")
        self.ran.append(size[0])
        return {"size": size[0]}

    def _rows(self, pieces: Any) -> list[Row]:
        return [Row("stands", f"{len(pieces)} quakes", str([piece["size"] for piece in pieces]), len(pieces) == 3)]


def run(folder: Path, **settings: Any) -> list[Row]:
    return run_part(Pieces().part, Form.FULL, folder, **{"afresh": False, "commit": COMMIT, **settings})


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    pieces = Pieces()
    for only in ({1}, {0, 1}, None):
        rows = run_part(pieces.part, Form.FULL, tmp_path, afresh=False, commit=COMMIT, only=only)
    assert pieces.ran == [1, 0, 2]
    assert rows == [Row("stands", "3 quakes", "[1, 0, 2]", True)]
    assert json.loads((tmp_path / "quake.json").read_text())["rows"] == [vars(rows[0])]


def test_results_of_another_commit_are_not_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path, only={0})
    with pytest.raises(ChaosError, match="at aaaaaaa, so it can't be gone on with at bbbbbbb"):
        run(tmp_path, commit="b" * 40)
    assert run(tmp_path, commit="b" * 40, afresh=True)[0].is_met


def test_a_part_that_needs_what_is_not_there_is_refused(tmp_path: Path) -> None:
    part = Part("quake", Pieces().part.run, Pieces().part.rows, {Form.FULL: []}, needs=["no-such-program"])
    with pytest.raises(ChaosError, match="quake: needs no-such-program"):
        run_part(part, Form.FULL, tmp_path, afresh=False, commit=COMMIT)


def test_a_piece_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChaosError, match="quake has 3 pieces, so none with the index 3"):
        run(tmp_path, only={0, 3})


def test_pieces_of_several_folders_are_joined_in_their_order(tmp_path: Path) -> None:
    run(tmp_path / "a", only={2})
    run(tmp_path / "b", only={0, 1})
    rows = join(Pieces().part, Form.FULL, [tmp_path / name for name in "ab"], tmp_path, commit=COMMIT)
    assert rows == [Row("stands", "3 quakes", "[0, 1, 2]", True)]
    assert run(tmp_path) == rows


@pytest.mark.parametrize(
    ("settings", "commit", "message"),
    [
        ({"only": {0, 1}}, COMMIT, "is there twice, or is no longer one: size"),
        ({"only": {2}}, "b" * 40, "can't be gone on with at bbbbbbb"),
        ({"only": {2}, "commit": "b" * 40}, COMMIT, "at bbbbbbb, so it can't"),
    ],
)
def test_what_does_not_belong_together_is_not_joined(
    tmp_path: Path, settings: dict[str, Any], commit: str, message: str
) -> None:
    run(tmp_path / "a", only={1})
    run(tmp_path / "b", **settings)
    with pytest.raises(ChaosError, match=message):
        join(Pieces().part, Form.FULL, [tmp_path / name for name in "ab"], tmp_path, commit=commit)
    with pytest.raises(ChaosError, match="no folder has"):
        join(Pieces().part, Form.FULL, [tmp_path / "c"], tmp_path, commit=COMMIT)


def test_the_table_holds_the_rows_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "REPOSITORY", tmp_path)
    run(tmp_path / "results", only={0})
    lines = table.table((Pieces().part,), tmp_path / "results").splitlines()
    assert lines[2:] == ["| stands | 1 quakes | [0] | **not met**, [quake](../results/quake.json) |"]
    document = f"before\n{table.BEGIN}\nold\n{table.END}\nafter"
    assert table.fill(document, "new\n") == document.replace("old", "new")
    assert results.FOLDER.name == "chaos"
