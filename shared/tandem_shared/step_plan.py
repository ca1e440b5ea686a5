"""The step protocol as plain data: what the scheduler core plans and what a worker answers.

Knows nothing of protobuf (see tandem_shared/step_codec.py), tensors or time. The rules that a plan obeys are
stated in protos/tandem/internal/v1/worker.proto.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

PADDING_BLOCK = 0
"""Block 0 takes the writes of padding and inactive rows; it is never handed out."""

FAULT_NAN_LOGITS = 1
"""RowFaultCode.ROW_FAULT_CODE_NAN_LOGITS."""


def _no_ints() -> Int32Array:
    return np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How a row turns logits into a token. temperature 0 is greedy, top_k 0 is all, num_logprobs None is no report."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice_index: int = 0
    num_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class NewRow:
    """A sequence that enters the worker's batch. Positions below num_cached_tokens are never written; sequence_id is
    for logs and errors.
    """

    row: int
    sequence_id: int
    token_ids: Int32Array
    num_prompt_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    block_ids: Int32Array
    sampling: RowSampling


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Changes to the persistent batch, applied in the order of the fields, then one forward pass."""

    step_id: int
    removed_rows: Int32Array = field(default_factory=_no_ints)
    added_rows: tuple[NewRow, ...] = ()
    appended_block_rows: Int32Array = field(default_factory=_no_ints)
    appended_block_ids: Int32Array = field(default_factory=_no_ints)
    chunk_rows: Int32Array = field(default_factory=_no_ints)
    chunk_num_tokens: Int32Array = field(default_factory=_no_ints)


@dataclass(frozen=True, slots=True)
class RowFault:
    """A fault of one row: its sequence ends, the others go on."""

    row: int
    code: int


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probability of a row's sampled token and of the likeliest tokens, likeliest first."""

    row: int
    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Unix times of the worker's clock in nanoseconds, and durations: the step's on the GPU, and its idling before."""

    received_ns: int = 0
    prepared_ns: int = 0
    sampled_ns: int = 0
    sent_ns: int = 0
    gpu_duration_ns: int = 0
    gpu_idle_ns: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """num_token_ids holds, for each row that sampled, rows ascending, how many of token_ids are its own (0 or 1)."""

    step_id: int
    num_token_ids: list[int]
    token_ids: list[int]
    faults: tuple[RowFault, ...] = ()
    logprobs: tuple[RowLogprobs, ...] = ()
    times: StepTimes = field(default_factory=StepTimes)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker is and holds. num_blocks counts the padding block; default_* are None where the model has none."""

    protocol_version: int
    worker_instance_id: str
    fingerprint: str
    model: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_rows: int
    max_num_batched_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    default_temperature: float | None = None
    default_top_k: int | None = None
    default_top_p: float | None = None
    default_min_p: float | None = None
    tokenizer_digest: str = ""
    """Of the model folder's tokenizer.json; empty where it has none"""
