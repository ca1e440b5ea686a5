"""Log-probability reports of many tokens, packed into a tenth of the memory that they take as objects."""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from tandem_shared.step_plan import PromptLogprobs, RowLogprobs

BYTES_PER_REPORT, BYTES_PER_TOP, BYTES_PER_REQUESTED = 10, 8, 4


def logprob_bytes(num_logprobs: int, num_requested: int) -> int:
    """The size of one token's report in a LogprobBuffer."""
    return BYTES_PER_REPORT + BYTES_PER_TOP * num_logprobs + BYTES_PER_REQUESTED * num_requested


class TokenReport(NamedTuple):
    """The report of one token: its own log-probability and rank, the likeliest tokens, and the requested ones."""

    logprob: float
    rank: int
    top_token_ids: "array[int]"
    top_logprobs: "array[float]"
    requested_logprobs: "array[float]"


class LogprobBuffer:
    """Reports in the order of their tokens."""

    __slots__ = (
        "_logprobs",
        "_num_requested",
        "_num_top",
        "_ranks",
        "_requested_logprobs",
        "_top_logprobs",
        "_top_token_ids",
    )

    def __init__(self) -> None:
        self._logprobs = array("f")
        self._ranks = array("I")
        self._num_top = array("B")
        self._num_requested = array("B")
        self._top_token_ids = array("i")
        self._top_logprobs = array("f")
        self._requested_logprobs = array("f")

    def __len__(self) -> int:
        return len(self._logprobs)

    def append(self, report: RowLogprobs) -> None:
        self._logprobs.append(report.logprob)
        self._ranks.append(report.rank)
        self._num_top.append(len(report.top_token_ids))
        self._num_requested.append(len(report.requested_logprobs))
        self._top_token_ids.extend(report.top_token_ids)
        self._top_logprobs.extend(report.top_logprobs)
        self._requested_logprobs.extend(report.requested_logprobs)

    def extend(self, report: PromptLogprobs) -> None:
        """Adds the reports of several tokens of a prompt."""
        count = len(report.logprobs)
        self._logprobs.frombytes(report.logprobs.tobytes())
        self._ranks.frombytes(report.ranks.tobytes())
        self._num_top += array("B", [report.num_top]) * count
        self._num_requested += array("B", bytes(count))
        self._top_token_ids.frombytes(report.top_token_ids.tobytes())
        self._top_logprobs.frombytes(report.top_logprobs.tobytes())

    def take(self, count: int) -> "LogprobBuffer":
        """Moves the first reports into a buffer of their own."""
        taken = LogprobBuffer()
        num_top, num_requested = sum(self._num_top[:count]), sum(self._num_requested[:count])
        for name, end in (
            ("_logprobs", count),
            ("_ranks", count),
            ("_num_top", count),
            ("_num_requested", count),
            ("_top_token_ids", num_top),
            ("_top_logprobs", num_top),
            ("_requested_logprobs", num_requested),
        ):
            values = getattr(self, name)
            setattr(taken, name, values[:end])
            del values[:end]
        return taken

    def cut(self, count: int) -> None:
        """Forgets all but the first reports."""
        kept = self.take(count)
        for name in self.__slots__:
            setattr(self, name, getattr(kept, name))

    def __iter__(self) -> Iterator[TokenReport]:
        top = requested = 0
        counts = zip(self._logprobs, self._ranks, self._num_top, self._num_requested, strict=True)
        for logprob, rank, num_top, num_requested in counts:
            top_ids, top_logprobs = self._top_token_ids[top : top + num_top], self._top_logprobs[top : top + num_top]
            requested_logprobs = self._requested_logprobs[requested : requested + num_requested]
            yield TokenReport(logprob, rank, top_ids, top_logprobs, requested_logprobs)
            top, requested = top + num_top, requested + num_requested
