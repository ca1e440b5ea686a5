"""Progress of what takes long at a start: a bar where stderr is a terminal, else a line in the log every few seconds,
also if the work itself stands still. What takes less leaves no trace.
"""

import logging
import sys
import threading
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 4.0
"""So that a start is never silent for 5 seconds."""
REFRESH_EVERY_S = 0.5
"""How often a bar's clock is drawn anew."""

logger = logging.getLogger(__name__)


class Progress:
    """Around the work, as a context manager. Nothing is shown if info is not logged."""

    def __init__(self, what: str, total: int | None = None, unit: str = "") -> None:
        """total: how many units the work has, if that is known."""
        self._what = what
        self._total = total
        self._unit = unit
        self._done = 0
        self._started_at = 0.0
        self._bar: Any = None
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def advance(self, count: int = 1) -> None:
        """So many units more are done."""
        self._done += count

    def __enter__(self) -> "Progress":
        self._started_at = time.monotonic()
        if logger.isEnabledFor(logging.INFO):
            if sys.stderr.isatty():
                form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}" if self._total else "{desc} {elapsed}"
                self._bar = tqdm(desc=self._what, total=self._total, bar_format=form, leave=False, file=sys.stderr)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._has_ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        while not self._has_ended.wait(LINE_EVERY_S if self._bar is None else REFRESH_EVERY_S):
            if self._bar is None:
                logger.info("%s", self._line())
            else:
                self._bar.n = self._done
                self._bar.refresh()

    def _line(self) -> str:
        took = f"{time.monotonic() - self._started_at:.0f} s"
        if self._total is None:
            return f"{self._what}: {took}"
        return f"{self._what}: {self._done} of {self._total} {self._unit}, {took}"


def say_no_progress() -> None:
    """For a process beside another that does the same and tells of it."""
    logger.setLevel(logging.WARNING)
