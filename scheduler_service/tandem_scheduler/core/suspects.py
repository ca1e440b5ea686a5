"""How a poisonous sequence, one that takes the worker down, is found without accusing those that were merely present.

A loss alone says little, since whoever kills workers hits whatever runs. So a sequence that was present at two losses,
with no proof in between that it can be computed, is only a suspect. Suspects are tried apart: once a session has
brought its first result, one suspect at a time is admitted while the worker holds none but proven sequences, and
nothing is admitted beside it until it is proven itself. Only a loss during its own trial counts against a sequence, and
after one it goes to the back of the queue, so that losses at regular moments hit a different sequence each time.
docs/decisions/0002-suspects.md says how sure the verdict is.

A sequence is proven once it has more tokens than it had when it was admitted plus those that may be in flight at once.
Then a step that was sent after its admission, and had it in it, has come back.
"""

from collections.abc import Callable, Iterable

import numpy as np

from tandem_scheduler.core.sequence import Sequence, SequenceState
from tandem_scheduler.core.types import SequenceRequest
from tandem_shared.sampling_fields import RowSampling

MAX_FAILED_TRIALS = 2
"""So many lost trials end a sequence if the worker said after the last one that a step had failed."""
MAX_VANISHED_TRIALS = 4
"""So many lost trials end a sequence if the worker vanished without a word, as it does when it is killed from
outside."""

PROBE_ID = 2**63
"""The probe's sequence id. The sequence ids of requests count from 0."""


def create_probe() -> Sequence:
    """A sequence of the scheduler's own, of one greedy token. Its result shows that a session can compute."""
    request = SequenceRequest(PROBE_ID, np.zeros(1, np.int32), max_tokens=1, sampling=RowSampling(temperature=0.0))
    return Sequence(request, arrival=-1)


class Suspects:
    """The rules above, for one scheduler. Decides which sequences may be admitted and which is guilty; moves none."""

    def __init__(self, num_in_flight: int) -> None:
        self._num_in_flight = num_in_flight
        self.start_session()

    def start_session(self) -> None:
        self.has_result = False
        self.is_probed = False
        # The suspect that was admitted last.
        self._on_trial: Sequence | None = None

    def note_admitted(self, sequence: Sequence) -> None:
        sequence.start_probation(self._num_in_flight)
        if sequence.is_suspect:
            self._on_trial = sequence

    def may_enter(self, sequence: Sequence, get_held: Callable[[], Iterable[Sequence]]) -> bool:
        """Whether a sequence may be admitted. get_held gives all sequences that the worker holds, including those that
        are only in steps in flight.
        """
        if self._is_trial_on:
            return False
        return not sequence.is_suspect or (self.has_result and all(other.is_proven for other in get_held()))

    def needs_probe(self, sequence: Sequence) -> bool:
        """Whether a suspect waits for a first result that nothing else may bring."""
        return sequence.is_suspect and not self.has_result and not self.is_probed

    def judge_loss(self, present: list[Sequence]) -> Sequence | None:
        """Notes a loss of the worker and the sequences that it held. Returns the sequence whose trial it was."""
        tried = self._on_trial if self._is_trial_on else None
        for sequence in present:
            sequence.note_loss(self._num_in_flight)
        if tried is not None:
            tried.num_trial_losses += 1
        return tried

    @staticmethod
    def verdict(tried: Sequence, failure: str) -> str | None:
        """Why a sequence that has just been tried ends, or None if it may go on.

        failure is the worker's last word on the step that failed, empty where it vanished.
        """
        count = tried.num_trial_losses
        if count < (MAX_FAILED_TRIALS if failure else MAX_VANISHED_TRIALS):
            return None
        reason = f"; the last time it said: {failure}" if failure else ""
        return f"the worker was lost {count} times while it computed this sequence apart from unproven others{reason}"

    @property
    def _is_trial_on(self) -> bool:
        tried = self._on_trial
        if tried is None or tried.state not in (SequenceState.RUNNING, SequenceState.DRAINING):
            return False
        return not tried.is_proven
