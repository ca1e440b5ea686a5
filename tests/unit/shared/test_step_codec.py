"""Plans, results and infos survive the wire, byte for byte of real protobuf."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.internal.v1 import worker_pb2
from tandem_shared.errors import InvalidPlan, ProtocolError
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, Grammar, SamplingLists
from tandem_shared.step_codec import (
    decode_info,
    decode_plan,
    decode_result,
    encode_info,
    encode_plan,
    encode_result,
    pack_ids,
    unpack_ids,
)
from tandem_shared.step_plan import (
    NewRow,
    RowFault,
    RowLogprobs,
    StepPlan,
    StepResult,
    StepTimes,
    WorkerInfo,
)
from tests.support.builders import plain, prompt_logprobs

numbers = st.integers(0, 2**31 - 1)
arrays = st.lists(numbers, max_size=6).map(lambda values: np.array(values, np.int32))
floats = st.floats(width=32, allow_nan=False)
samplings = st.builds(
    RowSampling,
    temperature=floats,
    top_k=numbers,
    top_p=floats,
    min_p=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    repetition_penalty=floats,
    min_tokens=numbers,
    seed=st.integers(0, 2**64 - 1),
    choice_index=numbers,
    num_logprobs=st.none() | st.integers(0, 20),
    num_prompt_logprobs=st.none() | st.integers(0, 20),
)
ids = st.lists(numbers, max_size=3).map(tuple)
lists = st.builds(
    SamplingLists,
    stop_token_ids=ids,
    logit_bias=st.lists(st.tuples(numbers, floats), max_size=3).map(tuple),
    allowed_token_ids=ids,
    bad_words=st.lists(ids, max_size=3).map(tuple),
    logprob_token_ids=ids,
    grammar=st.none()
    | st.builds(Grammar, st.text(max_size=4), start_after_token_id=st.none() | numbers, ignore_eos=st.booleans()),
)
rows = st.builds(
    NewRow,
    row=numbers,
    sequence_id=st.integers(0, 2**64 - 1),
    token_ids=arrays,
    num_prompt_tokens=numbers,
    num_computed_tokens=numbers,
    num_cached_tokens=numbers,
    block_ids=arrays,
    sampling=samplings,
    lists=lists,
)
plans = st.builds(
    StepPlan,
    step_id=st.integers(0, 2**64 - 1),
    removed_rows=arrays,
    added_rows=st.lists(rows, max_size=3).map(tuple),
    appended_block_rows=arrays,
    appended_block_ids=arrays,
    chunk_rows=arrays,
    chunk_num_tokens=arrays,
)
reports = st.builds(
    RowLogprobs,
    row=numbers,
    logprob=floats,
    top_token_ids=ids,
    top_logprobs=st.lists(floats, max_size=3).map(tuple),
    rank=numbers,
    requested_logprobs=st.lists(floats, max_size=3).map(tuple),
)
prompt_reports = st.builds(
    prompt_logprobs,
    row=numbers,
    first_position=numbers,
    logprobs=st.lists(floats, max_size=3),
    ranks=ids,
    num_top=numbers,
    top_token_ids=ids,
    top_logprobs=st.lists(floats, max_size=3),
)
times = st.builds(StepTimes, *[st.integers(0, 2**63)] * 6)
results = st.builds(
    StepResult,
    step_id=numbers,
    num_token_ids=st.lists(st.integers(0, 255), max_size=4),
    token_ids=st.lists(numbers, max_size=4),
    faults=st.lists(st.builds(RowFault, row=numbers, code=st.integers(0, 3)), max_size=2).map(tuple),
    logprobs=st.lists(reports, max_size=2).map(tuple),
    prompt_logprobs=st.lists(prompt_reports, max_size=2).map(tuple),
    times=times,
)
infos = st.builds(
    WorkerInfo,
    protocol_version=numbers,
    worker_instance_id=st.text(max_size=4),
    fingerprint=st.text(max_size=4),
    model=st.text(max_size=4),
    dtype=st.text(max_size=4),
    device=st.text(max_size=4),
    vocab_size=numbers,
    max_model_len=numbers,
    num_blocks=numbers,
    block_size=numbers,
    max_num_rows=numbers,
    max_num_batched_tokens=numbers,
    eos_token_ids=st.lists(numbers, max_size=3).map(tuple),
    sampling_defaults=st.fixed_dictionaries(
        {},
        optional={
            "temperature": floats,
            "top_k": numbers,
            "top_p": floats,
            "min_p": floats,
            "repetition_penalty": floats,
        },
    ),
    tokenizer_digest=st.text(max_size=4),
)


@given(plans)
def test_plans(plan: StepPlan) -> None:
    data = encode_plan(plan).SerializeToString()
    assert plain(decode_plan(worker_pb2.StepPlan.FromString(data))) == plain(plan)


@given(results)
def test_results(result: StepResult) -> None:
    data = encode_result(result).SerializeToString()
    assert plain(decode_result(worker_pb2.StepResult.FromString(data))) == plain(result)


@given(infos)
def test_infos(info: WorkerInfo) -> None:
    data = encode_info(info).SerializeToString()
    assert plain(decode_info(worker_pb2.GetWorkerInfoResponse.FromString(data))) == plain(info)


def test_a_steady_step_is_a_few_bytes() -> None:
    assert len(encode_plan(StepPlan(1000)).SerializeToString()) <= 3


def test_a_number_past_int32_arrives_as_one_that_validation_refuses() -> None:
    message = worker_pb2.StepPlan(step_id=1, removed_rows=[2**32 - 1])
    assert decode_plan(message).removed_rows.tolist() == [-1]


def test_ids_are_four_bytes_each_whatever_they_are() -> None:
    """64 new rows of 40,000 tokens are bytes that are copied, not varints that are decoded one by one."""
    ids = np.full(40_000, 151_935, np.int32)
    assert len(pack_ids(ids)) == 4 * len(ids)
    assert pack_ids(ids) == ids.tobytes()
    assert unpack_ids(pack_ids(ids)).tolist() == ids.tolist()


def test_the_lists_of_a_requests_choices_are_read_once() -> None:
    """A request of 64 choices with the longest lists held up the step that it entered for 200 ms."""
    long, other = SamplingLists(allowed_token_ids=(1, 2)), SamplingLists(allowed_token_ids=(3,))
    row = NewRow(0, 0, np.ones(1, np.int32), 1, 0, 0, np.ones(1, np.int32), RowSampling())
    kinds = [NO_LISTS, long, long, NO_LISTS, long, SamplingLists(allowed_token_ids=(1, 2)), other, other, NO_LISTS]
    plan = StepPlan(1, added_rows=tuple(dataclasses.replace(row, row=i, lists=each) for i, each in enumerate(kinds)))
    decoded = decode_plan(worker_pb2.StepPlan.FromString(encode_plan(plan).SerializeToString())).added_rows
    assert [each.lists for each in decoded] == kinds
    shared = [index for index in range(1, len(kinds)) if decoded[index].lists is decoded[index - 1].lists]
    assert shared == [2, 5, 7]


@pytest.mark.parametrize("field", ["token_ids", "block_ids"])
def test_ids_that_are_cut_are_an_invalid_plan(field: str) -> None:
    row = worker_pb2.NewRow(**{field: b"\x01\x00\x00"})
    with pytest.raises(InvalidPlan, match="whole number"):
        decode_plan(worker_pb2.StepPlan(step_id=1, added_rows=[row]))


@pytest.mark.parametrize("field", ["logprobs", "ranks", "top_token_ids", "top_logprobs"])
def test_a_report_on_a_prompt_with_broken_numbers_is_refused(field: str) -> None:
    report = worker_pb2.PromptLogprobs(**{field: bytes(6)})
    with pytest.raises(ProtocolError, match="6 bytes are not a whole number"):
        decode_result(worker_pb2.StepResult(prompt_logprobs=[report]))
