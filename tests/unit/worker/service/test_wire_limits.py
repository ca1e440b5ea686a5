"""Step plans are measured before they are decoded."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from tandem.internal.v1 import worker_pb2
from tandem_shared.errors import InvalidPlan
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_GRAMMAR_BYTES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_STOP_TOKEN_IDS,
    NO_LISTS,
    Grammar,
    SamplingLists,
    problems,
)
from tandem_shared.step_codec import encode_plan
from tandem_shared.step_plan import NewRow, StepPlan
from tandem_worker.service.wire_limits import SMALL_BYTES, bounded_plan
from tests.support.builders import worker_info

INFO = worker_info(max_num_rows=64, max_model_len=2048, max_num_batched_tokens=4096)
LARGEST_LISTS = SamplingLists(
    stop_token_ids=(999,) * MAX_STOP_TOKEN_IDS,
    logit_bias=tuple((token_id, 0.1) for token_id in range(MAX_LOGIT_BIAS)),
    allowed_token_ids=(999,) * MAX_ALLOWED_TOKEN_IDS,
    bad_words=((999,) * MAX_BAD_WORD_TOKENS,) * MAX_BAD_WORDS,
    logprob_token_ids=(999,) * MAX_LOGPROB_TOKEN_IDS,
    grammar=Grammar("\U0001f600" * MAX_GRAMMAR_BYTES, start_after_token_id=2**32 - 1, ignore_eos=True),
)
decode = bounded_plan(worker_pb2.ExecuteStepsRequest.FromString, INFO)


def request(**changes: object) -> worker_pb2.ExecuteStepsRequest:
    return worker_pb2.ExecuteStepsRequest(plan=worker_pb2.StepPlan(**changes))  # type: ignore[arg-type]


def with_lists(**lists: object) -> worker_pb2.ExecuteStepsRequest:
    return request(added_rows=[worker_pb2.NewRow(lists=worker_pb2.SamplingLists(**lists))])  # type: ignore[arg-type]


def test_the_largest_plan_of_a_batch_is_decoded() -> None:
    count = INFO.max_model_len
    assert not list(problems(LARGEST_LISTS, 1024))
    sampling = RowSampling(
        temperature=0.5,
        top_k=2**32 - 1,
        top_p=0.5,
        min_p=0.5,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=0.5,
        seed=2**64 - 1,
        choice_index=2**32 - 1,
        min_tokens=2**32 - 1,
        num_logprobs=20,
        num_prompt_logprobs=20,
    )
    ids = np.full(count, INFO.vocab_size - 1, np.int32)
    rows = np.arange(INFO.max_num_rows, dtype=np.int32)
    blocks = np.full(INFO.max_num_batched_tokens, 2**31 - 1, np.int32)
    plan = StepPlan(
        2**63,
        removed_rows=rows,
        added_rows=tuple(
            NewRow(row, 2**63, ids, count, count - 1, count, ids, sampling, LARGEST_LISTS if row < 3 else NO_LISTS)
            for row in rows.tolist()
        ),
        appended_block_rows=np.resize(rows, len(blocks)),
        appended_block_ids=blocks,
        chunk_rows=rows,
        chunk_num_tokens=np.full(len(rows), count, np.int32),
    )
    message = worker_pb2.ExecuteStepsRequest(plan=encode_plan(plan))
    assert len(message.SerializeToString()) > SMALL_BYTES
    assert decode(message.SerializeToString()) == message


@pytest.mark.parametrize(
    "message",
    [
        request(removed_rows=[1] * 200_000),
        request(chunk_num_tokens=[2**32 - 1] * 50_000),
        request(added_rows=[worker_pb2.NewRow()] * 10_000),
        request(added_rows=[worker_pb2.NewRow(token_ids=bytes(20_000))]),
        with_lists(allowed_token_ids=bytes(2_000_000)),
        with_lists(bad_word_lengths=[1] * 100_000),
        with_lists(biases=[1.0] * 20_000),
        worker_pb2.ExecuteStepsRequest(open=worker_pb2.OpenSession(scheduler_id="x" * 200_000)),
    ],
    ids=["rows", "counts", "added rows", "a long row", "ids", "lengths", "biases", "opening"],
)
def test_what_no_batch_needs_is_refused(message: worker_pb2.ExecuteStepsRequest) -> None:
    with pytest.raises(InvalidPlan, match="larger than any plan"):
        decode(message.SerializeToString())


def test_bytes_that_are_no_message_are_an_error_like_any_other() -> None:
    with pytest.raises(DecodeError):
        decode(b"\xff" * (SMALL_BYTES + 1))
