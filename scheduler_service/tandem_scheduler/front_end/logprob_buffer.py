"""Log-probability reports of many tokens, packed into a tenth of the memory that they take as objects."""

from array import array
from collections.abc import Iterator

from tandem_shared.step_plan import RowLogprobs


class LogprobBuffer:
    """Reports in the order of their tokens."""

    __slots__ = ("_logprobs", "_num_top", "_top_logprobs", "_top_token_ids")

    def __init__(self) -> None:
        self._logprobs = array("f")
        self._num_top = array("B")
        self._top_token_ids = array("i")
        self._top_logprobs = array("f")

    def __len__(self) -> int:
        return len(self._logprobs)

    def append(self, report: RowLogprobs) -> None:
        self._logprobs.append(report.logprob)
        self._num_top.append(len(report.top_token_ids))
        self._top_token_ids.extend(report.top_token_ids)
        self._top_logprobs.extend(report.top_logprobs)

    def take(self, count: int) -> "LogprobBuffer":
        """Moves the first reports into a buffer of their own."""
        taken = LogprobBuffer()
        num_top = sum(self._num_top[:count])
        for name, end in (
            ("_logprobs", count),
            ("_num_top", count),
            ("_top_token_ids", num_top),
            ("_top_logprobs", num_top),
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

    def reports(self, start: int, end: int) -> Iterator[tuple[float, "array[int]", "array[float]"]]:
        """For each token from start to end: its own log-probability, the likeliest token ids, and their
        log-probabilities.
        """
        first = sum(self._num_top[:start])
        for logprob, num_top in zip(self._logprobs[start:end], self._num_top[start:end], strict=True):
            top = slice(first, first + num_top)
            yield logprob, self._top_token_ids[top], self._top_logprobs[top]
            first += num_top
