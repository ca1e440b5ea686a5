"""A sequence, its states, and the table of legal transitions. Knows nothing of the contents of rows and blocks."""

from array import array
from enum import Enum, auto

from tandem_scheduler.core.block_manager import CachedBlock
from tandem_scheduler.core.types import SequenceRequest


class SequenceState(Enum):
    WAITING = auto()
    """The sequence is new or preempted, and holds no row and no blocks."""
    RUNNING = auto()
    """The sequence holds a row and blocks, and every further step may compute it."""
    DRAINING = auto()
    """The sequence is planned to its full length and has given back its row and blocks; its last results are under
    way."""
    FINISHED = auto()


TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.RUNNING: frozenset({SequenceState.WAITING, SequenceState.DRAINING, SequenceState.FINISHED}),
    SequenceState.DRAINING: frozenset({SequenceState.WAITING, SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}


class IllegalTransition(AssertionError):
    """The scheduler moved a sequence in a way that is not in TRANSITIONS, which is a bug."""


class Sequence:
    """The scheduler's unit: one prompt and one output. token_ids holds the prompt and the confirmed output."""

    __slots__ = (
        "arrival",
        "block_keys",
        "block_table",
        "former_block_table",
        "loss_streak",
        "next_reported_position",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_outstanding",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_trial_losses",
        "parent_block",
        "proven_len",
        "reports_prompt",
        "request",
        "row",
        "sequence_id",
        "state",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, request: SequenceRequest, arrival: int) -> None:
        self.request = request
        self.sequence_id = request.sequence_id
        self.stop_token_ids = request.stop_token_ids
        self.arrival = arrival
        self.state = SequenceState.WAITING
        self.token_ids = array("i", request.prompt_token_ids.tolist())
        self.num_prompt_tokens = len(self.token_ids)
        # Prompt tokens that the prefix cache had at the first admission; None before it.
        self.num_cached_tokens: int | None = None
        # The first prompt position whose log-probabilities are still to come out; num_prompt_tokens if none are.
        is_asked = request.sampling.num_prompt_logprobs is not None
        self.next_reported_position = 1 if is_asked else self.num_prompt_tokens
        # Whether the worker was told, at the entry into the row, to report the prompt's log-probabilities.
        self.reports_prompt = False
        # How many results are still under way that were planned before a preemption.
        self.num_outstanding = 0
        # For core/suspects.py, which has the rules: how many losses of the worker met the sequence, and how many of
        # them came during its own trials, since it last proved that it can be computed.
        self.loss_streak = 0
        self.num_trial_losses = 0
        self.proven_len = 0
        # The hash chain over the full blocks of token_ids, as far as it was needed yet.
        self.block_keys: list[int] = []
        self.row = -1
        self.block_table: list[int] = []
        # The block table that it had in its last row. Steps in flight may still write those blocks.
        self.former_block_table: list[int] = []
        # How many of the tokens that were known when it entered its row are scheduled. For a decoding row, Rows counts.
        self.num_computed_tokens = 0
        self.num_registered_blocks = 0
        self.parent_block: CachedBlock | None = None

    def enter_row(self, row: int, block_table: list[int], num_computed_tokens: int) -> None:
        self.move_to(SequenceState.RUNNING)
        self.row = row
        self.block_table = block_table
        self.former_block_table = []
        self.num_computed_tokens = num_computed_tokens
        self.reports_prompt = self.lacks_prompt_logprobs

    def leave_row(self) -> None:
        self.row = -1
        self.former_block_table = self.block_table
        self.block_table = []
        self.num_computed_tokens = 0
        self.num_registered_blocks = 0
        self.parent_block = None

    def start_probation(self, num_in_flight: int) -> None:
        """Sets the length that it must get past, to prove that it can be computed: beyond all tokens that may be under
        way at once.
        """
        if self.loss_streak and self.is_proven:
            self.loss_streak = self.num_trial_losses = 0
        self.proven_len = len(self.token_ids) + num_in_flight

    def note_loss(self, num_in_flight: int) -> None:
        """Notes that the worker was lost while it held this sequence."""
        self.start_probation(num_in_flight)
        self.loss_streak += 1
        self.num_outstanding = 0

    def move_to(self, state: SequenceState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"sequence {self.sequence_id}: {self.state.name} -> {state.name}")
        self.state = state

    @property
    def order(self) -> tuple[int, int]:
        """The sort key of admission: the lower priority value first, then the earlier arrival. The last in this order
        is preempted first.
        """
        return self.request.priority, self.arrival

    @property
    def max_len(self) -> int:
        return self.num_prompt_tokens + self.request.max_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens were asked for and have not all come."""
        return self.next_reported_position < self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    @property
    def is_proven(self) -> bool:
        """Whether it got past the tokens at which it was admitted, so that it is not what takes workers down."""
        return len(self.token_ids) > self.proven_len

    @property
    def is_suspect(self) -> bool:
        return self.loss_streak >= 2 and not self.is_proven
