"""The parts of the harness: what a part is, in which forms it runs, and the rows that it adds to the table."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Found = dict[str, Any]
"""What a piece found, in JSON's types."""


class Form(StrEnum):
    """How much of a part is tried."""

    SHORT = "short"
    LONG = "long"
    FULL = "full"


@dataclass(frozen=True)
class Row:
    """A row of the table in docs/reliability.md."""

    promise: str
    tried: str
    """What was done how often, with numbers from the results."""
    found: str
    is_met: bool


def trials_by_kind(pieces: Iterable[Found]) -> dict[str, list[Found]]:
    """The `trials` of all pieces by their `kind`, each with its `piece`."""
    found: dict[str, list[Found]] = defaultdict(list)
    for piece in pieces:
        for trial in piece["trials"]:
            found[trial["kind"]].append({**trial, "piece": piece})
    return found


@dataclass(frozen=True)
class Part:
    """Tries one kind of disaster, in pieces that are independent of each other, so that an interrupted run can go on
    with the next piece.

    run: takes the keywords of one piece and returns what it found; raises any error if it cannot go on.
    rows: makes rows of the table from what the pieces of one form found.
    pieces: the keywords of each piece, by form.
    needs: programs that must be on this machine.
    obstacle: says why this machine cannot run the part although it has the programs; empty if it can.
    """

    name: str
    run: Callable[..., Found]
    rows: Callable[[Sequence[Found]], list[Row]]
    pieces: Mapping[Form, Sequence[Mapping[str, Any]]]
    needs: Sequence[str] = field(default=())
    obstacle: Callable[[], str] = str

    def why_not(self) -> str:
        """Why the part cannot run on this machine; empty if it can."""
        missing = [name for name in self.needs if not shutil.which(name)]
        return f"needs {', '.join(missing)}" if missing else self.obstacle()
