"""The plain data that enters and leaves the scheduler core."""

from dataclasses import dataclass, field
from enum import Enum

from tandem_shared.errors import ConfigError
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists
from tandem_shared.step_plan import Int32Array, PromptLogprobs, RowLogprobs


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the scheduler. Those that a worker has too are cut to the worker's."""

    max_num_seqs: int = 256
    """Sequences running at once."""
    max_num_batched_tokens: int = 8192
    """The token budget of a step; at least max_num_seqs, so that every decoding row always fits."""
    max_chunk_tokens: int | None = None
    """The most prompt tokens of one sequence in one step; None means the token budget."""
    max_plans_in_flight: int = 2
    """How many steps may be planned before the oldest one's result is in: 1 to 4."""
    max_num_waiting: int = 4096
    """The most sequences that may wait for their first admission; past it QueueFull. Preempted ones don't count."""
    max_num_waiting_tokens: int = 2**22
    """The most prompt tokens of those sequences together, unless they belong to one request."""
    enable_prefix_caching: bool = True
    admission_watermark: float = 0.01
    """Share of the blocks that an admission leaves free, so that running sequences can grow."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "max_num_waiting_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every decoding row fits a step"
            )
        if self.max_chunk_tokens is not None and self.max_chunk_tokens < 1:
            raise ConfigError(f"max_chunk_tokens must be at least 1, is {self.max_chunk_tokens}")
        if not 1 <= self.max_plans_in_flight <= 4:
            raise ConfigError(f"max_plans_in_flight must be 1 to 4, is {self.max_plans_in_flight}")
        if not 0 <= self.admission_watermark < 1:
            raise ConfigError(f"admission_watermark must be in [0, 1), is {self.admission_watermark}")


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate. max_tokens counts output tokens; stop_token_ids includes the end-of-sequence ids.

    sequence_id is the engine's own number and never used again. The request id that a client chose stays at the edge,
    so that late outputs of a request can't reach another one of the same id.
    """

    sequence_id: int
    prompt_token_ids: Int32Array
    max_tokens: int
    sampling: RowSampling = field(default_factory=RowSampling)
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    """Lower is admitted earlier and preempted later."""
    cache_salt: str = ""
    deadline: float | None = None
    """When the sequence ends if it still waits, by the clock whose time Scheduler.expire() is told, in seconds."""
    lists: SamplingLists = NO_LISTS

    def has_expired(self, now: float) -> bool:
        return self.deadline is not None and self.deadline <= now


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    EXPIRED = "expired"
    """Its deadline passed while it waited."""


@dataclass(frozen=True, slots=True)
class FinishedSequence:
    """The end of a sequence. stop_token_id is set where one matched, error where reason is ERROR, and error_field where
    that field of the request brought the error on.
    """

    sequence_id: int
    reason: FinishReason
    num_output_tokens: int
    num_cached_tokens: int
    stop_token_id: int | None = None
    error: str | None = None
    error_field: str | None = None


@dataclass(slots=True)
class StepOutputs:
    """The outputs of one step: parallel lists of sequence ids and their new tokens, log-probability reports by sequence
    id, and the sequences that ended. prompt_logprobs has pairs of a sequence id and a report on prompt tokens: those of
    a sequence follow each other without gaps, and come before its first token or with it.
    """

    step_id: int
    sequence_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, RowLogprobs] = field(default_factory=dict)
    prompt_logprobs: list[tuple[int, PromptLogprobs]] = field(default_factory=list)
    finished: list[FinishedSequence] = field(default_factory=list)


@dataclass(slots=True)
class Counters:
    """What a scheduler has counted since its start. num_output_tokens falls by tokens that turn out to be overshoot;
    the others only grow.
    """

    num_steps: int = 0
    num_preemptions: int = 0
    num_worker_losses: int = 0
    num_prompt_tokens: int = 0
    """Tokens of all prompts that were taken."""
    num_admitted_prompt_tokens: int = 0
    """Those of them whose sequences were admitted."""
    num_cached_prompt_tokens: int = 0
    """Those of the admitted ones that the prefix cache had at the first admission."""
    num_output_tokens: int = 0
    num_overshoot_tokens: int = 0
    """Tokens that were computed past a sequence's end, and dropped."""


@dataclass(frozen=True, slots=True)
class Load:
    """The state of now, then the Counters. total = free + cached + used blocks; block 0 is not counted."""

    num_waiting_sequences: int
    num_running_sequences: int
    num_total_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_used_blocks: int
    block_size: int
    num_steps_in_flight: int
    num_steps: int
    num_preemptions: int
    num_worker_losses: int
    num_prompt_tokens: int
    num_admitted_prompt_tokens: int
    num_cached_prompt_tokens: int
    num_output_tokens: int
    num_overshoot_tokens: int
