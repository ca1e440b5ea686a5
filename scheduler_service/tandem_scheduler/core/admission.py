"""Which waiting sequences enter the worker's batch: strictly in order, one by one, while there is room.

Knows the queue, the suspects and the plan under construction; gives rows and blocks through Residency alone.
"""

from collections.abc import Callable

from tandem_scheduler.core.plan_builder import PlanBuilder
from tandem_scheduler.core.residency import Residency
from tandem_scheduler.core.sequence import Sequence
from tandem_scheduler.core.suspects import Suspects, create_probe
from tandem_scheduler.core.types import Counters
from tandem_scheduler.core.waiting_queue import WaitingQueue


class Admission:
    """The rules of admission. The first sequence in order that must wait is not overtaken."""

    def __init__(self, queue: WaitingQueue, suspects: Suspects, counters: Counters, watermark: float) -> None:
        """watermark: the share of all blocks that an admission leaves free, so that running sequences can grow."""
        self._queue = queue
        self._suspects = suspects
        self._counters = counters
        self._watermark = watermark

    def admit(self, plan: PlanBuilder, residency: Residency, get_held: Callable[[], set[Sequence]]) -> None:
        """Admits sequences while the plan has budget left. get_held gives all sequences that the worker holds."""
        while plan.budget > 0 and (sequence := self._queue.first()) is not None:
            if sequence in plan.preempted:
                # Its deadline may have passed while it ran. Then expire() ends it before the next plan.
                return
            if self._suspects.needs_probe(sequence):
                self._probe(plan, residency)
            # A preempted sequence waits until all its results are in, as only then its tokens are known.
            if sequence.num_outstanding or not self._suspects.may_enter(sequence, get_held):
                return
            new_row = residency.try_enter(sequence, self._watermark)
            if new_row is None:
                return
            self._queue.pop()
            if sequence.num_cached_tokens is None:
                self._queue.note_no_longer_new(sequence)
                sequence.num_cached_tokens = new_row.num_cached_tokens
                self._counters.num_admitted_prompt_tokens += sequence.num_prompt_tokens
                self._counters.num_cached_prompt_tokens += new_row.num_cached_tokens
            self._suspects.note_admitted(sequence)
            plan.add_row(new_row, sequence)

    def _probe(self, plan: PlanBuilder, residency: Residency) -> None:
        """Admits a sequence of the scheduler's own, whose result will show that the session can compute."""
        probe = create_probe()
        new_row = residency.try_enter(probe, 0.0)
        if new_row is not None:
            self._suspects.is_probed = True
            plan.add_row(new_row, probe)
