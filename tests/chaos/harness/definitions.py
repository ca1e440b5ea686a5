"""What a part of the harness is."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Found = dict[str, Any]
"""What a piece found, as JSON has it."""


class Form(StrEnum):
    """How much is tried."""

    SHORT = "short"
    LONG = "long"
    FULL = "full"


@dataclass(frozen=True)
class Row:
    """A row of the table in docs/reliability.md."""

    promise: str
    tried: str
    """How much of what, with numbers from the results."""
    found: str
    is_met: bool


@dataclass(frozen=True)
class Part:
    """Tries one kind of disaster, in pieces that are independent of each other, so that a run can go on where it was
    interrupted.

    run: takes the keywords of one piece and returns what it found; raises AssertionError, or whatever else, where
    nothing more can be found out.
    rows: what the pieces of one form add up to.
    needs: programs that must be on this machine.
    obstacle: why this machine can't do it all the same; empty where it can.
    """

    name: str
    run: Callable[..., Found]
    rows: Callable[[Sequence[Found]], list[Row]]
    pieces: Mapping[Form, Sequence[Mapping[str, Any]]]
    needs: Sequence[str] = field(default=())
    obstacle: Callable[[], str] = str

    def why_not(self) -> str:
        """Why it can't be tried here; empty where it can."""
        missing = [name for name in self.needs if not shutil.which(name)]
        return f"needs {', '.join(missing)}" if missing else self.obstacle()
