"""Sequences that wait for a row, in order, and how many of them may. Knows nothing of rows, blocks or steps."""

import heapq
import itertools
from collections.abc import Iterable
from typing import Any

from tandem_scheduler.core.sequence import Sequence, SequenceState
from tandem_shared.errors import FieldViolation, InvalidRequest, QueueFull


class WaitingQueue:
    """A heap by priority and arrival. New sequences (never admitted) are bounded in number, preempted ones are not.

    Sequences that end while they wait stay in the heap until they come first, or most of the heap has ended.
    """

    def __init__(self, max_num_new: int, max_num_new_tokens: int) -> None:
        self._max_num_new = max_num_new
        self._max_num_new_tokens = max_num_new_tokens
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        # Deadline, a number that makes entries differ, sequence. Some of them have ended, or run.
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._entry_numbers = itertools.count()
        self.num_new = 0
        self.num_new_tokens = 0

    @property
    def entries(self) -> list[Sequence]:
        """Some of them may wait no more."""
        return [sequence for _, sequence in self._heap]

    def refuse_if_full(self, sequences: Iterable[Sequence]) -> None:
        """For the sequences of one new request. Raises InvalidRequest where they are more than may ever wait, QueueFull
        where they are more than may wait now. A request alone may have more tokens than the limit: it would be told to
        come again for ever.
        """
        lengths = [sequence.num_prompt_tokens for sequence in sequences]
        most = self._max_num_new
        if len(lengths) > most:
            raise InvalidRequest(
                FieldViolation("num_choices", f"{len(lengths)} are more than the {most} that may wait")
            )
        if self.num_new + len(lengths) > most:
            raise QueueFull(f"{self.num_new} sequences are waiting")
        if self.num_new and self.num_new_tokens + sum(lengths) > self._max_num_new_tokens:
            raise QueueFull(f"{self.num_new_tokens} prompt tokens are waiting")

    def push_new(self, sequence: Sequence, num_live: int) -> None:
        """Takes a sequence that was never admitted; num_live as for push()."""
        self.num_new += 1
        self.num_new_tokens += sequence.num_prompt_tokens
        self.push(sequence, num_live)

    def push(self, sequence: Sequence, num_live: int) -> None:
        """Takes a sequence that waits. num_live: how many sequences there are, to see whether most of what the queue
        holds has ended.
        """
        _push(self._heap, (sequence.order, sequence), num_live)
        if (deadline := sequence.request.deadline) is not None:
            _push(self._deadlines, (deadline, next(self._entry_numbers), sequence), num_live)

    def expired(self, now: float) -> list[Sequence]:
        """Those that wait although their deadlines have passed. The caller ends them."""
        expired: dict[Sequence, None] = {}
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            # One that runs comes back here when it is preempted.
            if sequence.state is SequenceState.WAITING:
                expired[sequence] = None
        return list(expired)

    def first(self) -> Sequence | None:
        """The next in order that waits."""
        while self._heap and self._heap[0][1].state is not SequenceState.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Takes out what first() gave."""
        heapq.heappop(self._heap)

    def note_no_longer_new(self, sequence: Sequence) -> None:
        """It is admitted for the first time, or has ended before that."""
        self.num_new -= 1
        self.num_new_tokens -= sequence.num_prompt_tokens


def _push(heap: list[Any], entry: tuple[Any, ...], num_live: int) -> None:
    """Adds an entry, which ends with its sequence. First forgets those that wait no more, where they are most."""
    if len(heap) > 2 * num_live:
        heap[:] = [each for each in heap if each[-1].state is SequenceState.WAITING]
        heapq.heapify(heap)
    heapq.heappush(heap, entry)
