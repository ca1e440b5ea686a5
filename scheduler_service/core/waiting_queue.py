"""Sequences that wait for a row, in order, and how many of them may. Knows nothing of rows, blocks or steps."""

import heapq
import math
from collections.abc import Iterable

from scheduler_service.core.sequence import Sequence, SequenceState
from shared.errors import FieldViolation, InvalidRequest, QueueFull


class WaitingQueue:
    """A heap by priority and arrival. New sequences (never admitted) are bounded in number, preempted ones are not.

    Sequences that end while they wait stay in the heap until they come first, or most of the heap has ended.
    """

    def __init__(self, max_num_new: int, max_num_new_tokens: int) -> None:
        self._max_num_new = max_num_new
        self._max_num_new_tokens = max_num_new_tokens
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        # Nothing in the heap has an earlier one.
        self._next_deadline = math.inf
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
        self.num_new += 1
        self.num_new_tokens += sequence.num_prompt_tokens
        self.push_again(sequence, num_live)

    def push_again(self, sequence: Sequence, num_live: int) -> None:
        """A preempted sequence. num_live is how many there are, to see whether most of the heap has ended."""
        if len(self._heap) > 2 * num_live:
            self._forget_ended()
        heapq.heappush(self._heap, (sequence.order, sequence))
        if sequence.request.deadline is not None:
            self._next_deadline = min(self._next_deadline, sequence.request.deadline)

    def expired(self, now: float) -> list[Sequence]:
        """Those that wait although their deadlines have passed. The caller ends them."""
        if now < self._next_deadline:
            return []
        self._forget_ended()
        expired, deadlines = [], []
        for _, sequence in self._heap:
            if (deadline := sequence.request.deadline) is not None:
                if deadline <= now:
                    expired.append(sequence)
                else:
                    deadlines.append(deadline)
        self._next_deadline = min(deadlines, default=math.inf)
        return expired

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

    def _forget_ended(self) -> None:
        self._heap = [entry for entry in self._heap if entry[1].state is SequenceState.WAITING]
        heapq.heapify(self._heap)
