"""The sequences that wait for a row, in order, and how many may wait. Knows nothing of rows, blocks or steps."""

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
        # A heap of (deadline, a number that no other entry has, sequence). Some of the sequences have ended, or run.
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._entry_numbers = itertools.count()
        self.num_new = 0
        self.num_new_tokens = 0

    @property
    def entries(self) -> list[Sequence]:
        """The sequences in the heap. Some of them may no longer wait."""
        return [sequence for _, sequence in self._heap]

    def refuse_if_full(self, sequences: Iterable[Sequence]) -> None:
        """Checks whether the sequences of one new request may wait. Raises InvalidRequest if they are more than may
        ever wait, QueueFull if they are more than may wait now. If nothing waits, a request may have more tokens than
        the limit, as otherwise it would be told to try again for ever.
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
        """Adds a sequence that was never admitted. num_live is as for push()."""
        self.num_new += 1
        self.num_new_tokens += sequence.num_prompt_tokens
        self.push(sequence, num_live)

    def push(self, sequence: Sequence, num_live: int) -> None:
        """Adds a sequence that waits. num_live is the number of live sequences, which shows whether most entries of the
        queue have ended.
        """
        _push(self._heap, (sequence.order, sequence), num_live)
        if (deadline := sequence.request.deadline) is not None:
            _push(self._deadlines, (deadline, next(self._entry_numbers), sequence), num_live)

    def expired(self, now: float) -> list[Sequence]:
        """The sequences that wait although their deadlines have passed. The caller ends them."""
        expired: dict[Sequence, None] = {}
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            # A sequence that runs gets a new entry when it is preempted.
            if sequence.state is SequenceState.WAITING:
                expired[sequence] = None
        return list(expired)

    def first(self) -> Sequence | None:
        """The next sequence in order that waits, or None."""
        while self._heap and self._heap[0][1].state is not SequenceState.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Removes the sequence that first() returned."""
        heapq.heappop(self._heap)

    def note_no_longer_new(self, sequence: Sequence) -> None:
        """Notes that a sequence is admitted for the first time, or has ended before that."""
        self.num_new -= 1
        self.num_new_tokens -= sequence.num_prompt_tokens


def _push(heap: list[Any], entry: tuple[Any, ...], num_live: int) -> None:
    """Adds an entry, whose last item is its sequence. If most entries no longer wait, removes these first."""
    if len(heap) > 2 * num_live:
        heap[:] = [each for each in heap if each[-1].state is SequenceState.WAITING]
        heapq.heapify(heap)
    heapq.heappush(heap, entry)
