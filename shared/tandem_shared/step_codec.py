"""Converts step plans, step results and worker infos to protobuf and back. worker.proto states their rules, which this
file does not check.
"""

import itertools
from collections.abc import Iterable, Sequence
from operator import attrgetter

import numpy as np

from tandem.internal.v1 import worker_pb2
from tandem_shared.errors import InvalidPlan, ProtocolError
from tandem_shared.sampling_fields import FIELDS, MODEL_DEFAULT_FIELDS, RowSampling
from tandem_shared.sampling_lists import NO_LISTS, Grammar, SamplingLists
from tandem_shared.step_plan import (
    Float32Array,
    Int32Array,
    NewRow,
    PromptLogprobs,
    RowFault,
    RowLogprobs,
    StepPlan,
    StepResult,
    StepTimes,
    WorkerInfo,
)

PROTOCOL_VERSION = 3

IDS = np.dtype("<i4")
"""The type of token and block ids on the wire. Varints would cost both ends a loop over the many ids of a prompt."""
FLOATS = np.dtype("<f4")
"""The type of the log-probabilities of prompts on the wire."""

_SAMPLING_NAMES = tuple(each.name for each in FIELDS)
_sampling_values = attrgetter(*_SAMPLING_NAMES)
_OPTIONAL_SAMPLING = tuple((index, each.name) for index, each in enumerate(FIELDS) if each.default is None)


def pack_ids(ids: Int32Array | Sequence[int]) -> bytes:
    return np.asarray(ids, IDS).tobytes()


def unpack_ids(data: bytes) -> Int32Array:
    """Raises ProtocolError if the bytes are not a whole number of ids."""
    if len(data) % IDS.itemsize:
        raise ProtocolError(f"{len(data)} bytes are not a whole number of ids")
    return np.frombuffer(data, IDS).astype(np.int32)


def pack_floats(values: Float32Array) -> bytes:
    return np.asarray(values, FLOATS).tobytes()


def unpack_floats(data: bytes) -> Float32Array:
    """Raises ProtocolError if the bytes are not a whole number of float32."""
    if len(data) % FLOATS.itemsize:
        raise ProtocolError(f"{len(data)} bytes are not a whole number of float32")
    return np.frombuffer(data, FLOATS).astype(np.float32)


def encode_plan(plan: StepPlan) -> worker_pb2.StepPlan:
    message = worker_pb2.StepPlan(
        step_id=plan.step_id,
        removed_rows=plan.removed_rows.tolist(),
        appended_block_rows=plan.appended_block_rows.tolist(),
        appended_block_ids=plan.appended_block_ids.tolist(),
        chunk_rows=plan.chunk_rows.tolist(),
        chunk_num_tokens=plan.chunk_num_tokens.tolist(),
    )
    # The choices of a request have the same lists, which may be long, so they are encoded once.
    encoded_lists: dict[int, worker_pb2.SamplingLists] = {}
    for row in plan.added_rows:
        added = message.added_rows.add(
            row=row.row,
            sequence_id=row.sequence_id,
            token_ids=pack_ids(row.token_ids),
            num_prompt_tokens=row.num_prompt_tokens,
            num_computed_tokens=row.num_computed_tokens,
            num_cached_tokens=row.num_cached_tokens,
            block_ids=pack_ids(row.block_ids),
        )
        encode_sampling(row.sampling, added.sampling)
        if (encoded := encoded_lists.get(id(row.lists))) is not None:
            added.lists.CopyFrom(encoded)
        elif row.lists:
            encode_lists(row.lists, added.lists)
            encoded_lists[id(row.lists)] = added.lists
    return message


def decode_plan(message: worker_pb2.StepPlan) -> StepPlan:
    """Neighbouring rows of equal lists, such as a request's choices, get the same object. Raises InvalidPlan if the
    bytes of ids are not a whole number of ids, or lists do not fit each other.
    """
    rows: list[NewRow] = []
    for each in message.added_rows:
        is_like_previous = (
            bool(rows) and each.HasField("lists") and each.lists == message.added_rows[len(rows) - 1].lists
        )
        rows.append(_decode_row(each, rows[-1].lists if is_like_previous else None))
    return StepPlan(
        step_id=message.step_id,
        removed_rows=_ints(message.removed_rows),
        added_rows=tuple(rows),
        appended_block_rows=_ints(message.appended_block_rows),
        appended_block_ids=_ints(message.appended_block_ids),
        chunk_rows=_ints(message.chunk_rows),
        chunk_num_tokens=_ints(message.chunk_num_tokens),
    )


def encode_result(result: StepResult) -> worker_pb2.StepResult:
    times = result.times
    message = worker_pb2.StepResult(
        step_id=result.step_id,
        num_token_ids=bytes(result.num_token_ids),
        token_ids=pack_ids(result.token_ids),
        faults=[worker_pb2.RowFault(row=f.row, code=worker_pb2.RowFaultCode.ValueType(f.code)) for f in result.faults],
        logprobs=[
            worker_pb2.RowLogprobs(
                row=r.row,
                logprob=r.logprob,
                top_token_ids=r.top_token_ids,
                top_logprobs=r.top_logprobs,
                rank=r.rank,
                requested_logprobs=r.requested_logprobs,
            )
            for r in result.logprobs
        ],
        times=worker_pb2.StepTimes(
            received_ns=times.received_ns,
            prepared_ns=times.prepared_ns,
            sampled_ns=times.sampled_ns,
            sent_ns=times.sent_ns,
            gpu_duration_ns=times.gpu_duration_ns,
            gpu_idle_ns=times.gpu_idle_ns,
        ),
    )
    for report in result.prompt_logprobs:
        encode_prompt_logprobs(report, message.prompt_logprobs.add())
    return message


def decode_result(message: worker_pb2.StepResult) -> StepResult:
    times = message.times
    return StepResult(
        step_id=message.step_id,
        num_token_ids=list(message.num_token_ids),
        token_ids=unpack_ids(message.token_ids).tolist(),
        faults=tuple(RowFault(fault.row, fault.code) for fault in message.faults),
        logprobs=tuple(
            RowLogprobs(
                report.row,
                report.logprob,
                # A slice takes half the time of iterating protobuf's container.
                tuple(report.top_token_ids[:]),
                tuple(report.top_logprobs[:]),
                report.rank,
                tuple(report.requested_logprobs[:]),
            )
            for report in message.logprobs
        ),
        prompt_logprobs=tuple(map(decode_prompt_logprobs, message.prompt_logprobs)),
        times=StepTimes(
            received_ns=times.received_ns,
            prepared_ns=times.prepared_ns,
            sampled_ns=times.sampled_ns,
            sent_ns=times.sent_ns,
            gpu_duration_ns=times.gpu_duration_ns,
            gpu_idle_ns=times.gpu_idle_ns,
        ),
    )


def encode_prompt_logprobs(report: PromptLogprobs, message: worker_pb2.PromptLogprobs) -> None:
    """Fills a new message, which is part of another one."""
    message.row = report.row
    message.first_position = report.first_position
    message.logprobs = pack_floats(report.logprobs)
    message.ranks = pack_ids(report.ranks)
    message.num_top = report.num_top
    message.top_token_ids = pack_ids(report.top_token_ids)
    message.top_logprobs = pack_floats(report.top_logprobs)


def decode_prompt_logprobs(message: worker_pb2.PromptLogprobs) -> PromptLogprobs:
    """Raises ProtocolError if bytes are not a whole number of values."""
    return PromptLogprobs(
        message.row,
        message.first_position,
        unpack_floats(message.logprobs),
        unpack_ids(message.ranks),
        message.num_top,
        unpack_ids(message.top_token_ids),
        unpack_floats(message.top_logprobs),
    )


def encode_info(info: WorkerInfo) -> worker_pb2.GetWorkerInfoResponse:
    return worker_pb2.GetWorkerInfoResponse(
        protocol_version=info.protocol_version,
        worker_instance_id=info.worker_instance_id,
        fingerprint=info.fingerprint,
        model=info.model,
        dtype=info.dtype,
        device=info.device,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        num_blocks=info.num_blocks,
        block_size_tokens=info.block_size,
        max_num_rows=info.max_num_rows,
        max_num_batched_tokens=info.max_num_batched_tokens,
        eos_token_ids=info.eos_token_ids,
        tokenizer_digest=info.tokenizer_digest,
        **{f"default_{name}": value for name, value in info.sampling_defaults.items()},  # type: ignore[arg-type]
    )


def decode_info(message: worker_pb2.GetWorkerInfoResponse) -> WorkerInfo:
    return WorkerInfo(
        protocol_version=message.protocol_version,
        worker_instance_id=message.worker_instance_id,
        fingerprint=message.fingerprint,
        model=message.model,
        dtype=message.dtype,
        device=message.device,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        num_blocks=message.num_blocks,
        block_size=message.block_size_tokens,
        max_num_rows=message.max_num_rows,
        max_num_batched_tokens=message.max_num_batched_tokens,
        eos_token_ids=tuple(message.eos_token_ids),
        sampling_defaults={
            each.name: getattr(message, f"default_{each.name}")
            for each in MODEL_DEFAULT_FIELDS
            if message.HasField(f"default_{each.name}")  # type: ignore[arg-type]
        },
        tokenizer_digest=message.tokenizer_digest,
    )


def encode_sampling(sampling: RowSampling, message: worker_pb2.RowSampling) -> None:
    """Fills a new message. It is part of another message, as one that is built apart would have to be copied."""
    for name in _SAMPLING_NAMES:
        value = getattr(sampling, name)
        if value is not None:
            setattr(message, name, value)


def decode_sampling(message: worker_pb2.RowSampling) -> RowSampling:
    values = list(_sampling_values(message))
    for index, name in _OPTIONAL_SAMPLING:
        if not message.HasField(name):  # type: ignore[arg-type]
            values[index] = None
    return RowSampling(*values)


def encode_lists(lists: SamplingLists, message: worker_pb2.SamplingLists) -> None:
    """Fills a new message, which is part of another one."""
    message.stop_token_ids = pack_ids(lists.stop_token_ids)
    message.bias_token_ids = pack_ids([token_id for token_id, _ in lists.logit_bias])
    message.biases.extend(bias for _, bias in lists.logit_bias)
    message.allowed_token_ids = pack_ids(lists.allowed_token_ids)
    message.bad_word_token_ids = pack_ids([token_id for word in lists.bad_words for token_id in word])
    message.bad_word_lengths.extend(map(len, lists.bad_words))
    message.logprob_token_ids = pack_ids(lists.logprob_token_ids)
    if (grammar := lists.grammar) is not None:
        message.grammar.text = grammar.text
        message.grammar.ignore_eos = grammar.ignore_eos
        if grammar.start_after_token_id is not None:
            message.grammar.start_after_token_id = grammar.start_after_token_id


def decode_lists(message: worker_pb2.SamplingLists) -> SamplingLists:
    """Raises ProtocolError if parallel fields do not fit each other."""
    bias_ids, words = unpack_ids(message.bias_token_ids).tolist(), unpack_ids(message.bad_word_token_ids).tolist()
    if len(bias_ids) != len(message.biases):
        raise ProtocolError(f"{len(message.biases)} biases for {len(bias_ids)} tokens")
    ends = list(itertools.accumulate(message.bad_word_lengths))
    if (ends[-1] if ends else 0) != len(words):
        raise ProtocolError("the lengths of the bad words do not add up to their tokens")
    grammar = message.grammar
    return SamplingLists(
        stop_token_ids=tuple(unpack_ids(message.stop_token_ids).tolist()),
        logit_bias=tuple(zip(bias_ids, message.biases, strict=True)),
        allowed_token_ids=tuple(unpack_ids(message.allowed_token_ids).tolist()),
        bad_words=tuple(tuple(words[start:end]) for start, end in itertools.pairwise([0, *ends])),
        logprob_token_ids=tuple(unpack_ids(message.logprob_token_ids).tolist()),
        grammar=Grammar(
            grammar.text,
            grammar.start_after_token_id if grammar.HasField("start_after_token_id") else None,
            grammar.ignore_eos,
        )
        if message.HasField("grammar")
        else None,
    )


def _decode_row(message: worker_pb2.NewRow, lists: SamplingLists | None) -> NewRow:
    """lists: those of the row, if they are known."""
    try:
        if lists is None:
            lists = decode_lists(message.lists) if message.HasField("lists") else NO_LISTS
        return NewRow(
            row=message.row,
            sequence_id=message.sequence_id,
            token_ids=unpack_ids(message.token_ids),
            num_prompt_tokens=message.num_prompt_tokens,
            num_computed_tokens=message.num_computed_tokens,
            num_cached_tokens=message.num_cached_tokens,
            block_ids=unpack_ids(message.block_ids),
            sampling=decode_sampling(message.sampling),
            lists=lists,
        )
    except ProtocolError as error:
        raise InvalidPlan(f"added row {message.row}: {error}") from error


def _ints(values: Iterable[int]) -> Int32Array:
    # Through uint32, a number beyond int32 becomes negative, which the batch's checks refuse, and nothing raises here.
    return np.array(list(values), np.uint32).astype(np.int32)
