"""The step protocol as plain data: what the scheduler core plans and what a worker answers.

protos/tandem/internal/v1/worker.proto states what the fields mean and the rules that a plan obeys. step_codec.py
converts to protobuf and back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

PADDING_BLOCK = 0
"""The KV block that padding tokens and inactive rows are stored in. No sequence ever gets it."""

FAULT_NAN_LOGITS = 1
"""The RowFault code of a row whose logits hold NaN or nothing finite."""
FAULT_GRAMMAR = 2
"""The RowFault code of a row whose grammar failed, or needed more than its limits."""
FAULT_NO_TOKEN = 3
"""The RowFault code of a row whose lists leave no token to sample."""


def _no_ints() -> Int32Array:
    return np.empty(0, np.int32)


def _no_floats() -> Float32Array:
    return np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class NewRow:
    """A sequence that enters the worker's batch at `row`. token_ids is (num_tokens,), block_ids is (num_blocks,).
    Positions below num_cached_tokens are in shared blocks and never written. sequence_id is for logs and errors.
    """

    row: int
    sequence_id: int
    token_ids: Int32Array
    num_prompt_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    block_ids: Int32Array
    sampling: RowSampling
    lists: SamplingLists = NO_LISTS


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Changes to the persistent batch, applied in the order of the fields, then one forward pass. appended_block_rows
    and appended_block_ids are parallel, and so are chunk_rows and chunk_num_tokens.
    """

    step_id: int
    removed_rows: Int32Array = field(default_factory=_no_ints)
    added_rows: tuple[NewRow, ...] = ()
    appended_block_rows: Int32Array = field(default_factory=_no_ints)
    appended_block_ids: Int32Array = field(default_factory=_no_ints)
    chunk_rows: Int32Array = field(default_factory=_no_ints)
    chunk_num_tokens: Int32Array = field(default_factory=_no_ints)


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row that could not sample. Its sequence ends with an error; the other rows go on."""

    row: int
    code: int


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """The natural log-probabilities of a row's sampled token, of the likeliest tokens, likeliest first, and of the
    row's logprob_token_ids, in their order. rank is 1 plus the number of tokens likelier than the sampled one.
    """

    row: int
    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    rank: int = 1
    requested_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The log-probabilities of prompt tokens at consecutive positions, each given the tokens before it. logprobs and
    ranks are (num_positions,); top_token_ids and top_logprobs are (num_positions * num_top,), those of a position
    likeliest first. They are arrays because a step may report thousands of positions.
    """

    row: int
    first_position: int
    logprobs: Float32Array
    ranks: Int32Array
    num_top: int = 0
    top_token_ids: Int32Array = field(default_factory=_no_ints)
    top_logprobs: Float32Array = field(default_factory=_no_floats)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When a step was run, in nanoseconds of Unix time by the worker's clock, and in nanoseconds how long it took on
    the GPU and how long the GPU had idled before it. Time without any request counts as idle too.
    """

    received_ns: int = 0
    prepared_ns: int = 0
    sampled_ns: int = 0
    sent_ns: int = 0
    gpu_duration_ns: int = 0
    gpu_idle_ns: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought. For each row that sampled, in ascending order of rows, num_token_ids says how many of
    token_ids are that row's: 1, or 0 if the row has a fault.
    """

    step_id: int
    num_token_ids: list[int]
    token_ids: list[int]
    faults: tuple[RowFault, ...] = ()
    logprobs: tuple[RowLogprobs, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    times: StepTimes = field(default_factory=StepTimes)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker is and what it can hold. num_blocks counts the padding block."""

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
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    """The model's own defaults of sampling fields, by name; without those that it does not have."""
    tokenizer_digest: str = ""
    """The digest of tokenizer.json in the model's folder, empty if there is none."""
