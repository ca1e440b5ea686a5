"""Step plans are measured before they are decoded."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from tandem.internal.v1 import worker_pb2
from tandem_shared.errors import InvalidPlan
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_codec import encode_plan
from tandem_shared.step_plan import NewRow, StepPlan
from tandem_worker.service.wire_limits import SMALL_BYTES, bounded_plan
from tests.support.builders import worker_info

INFO = worker_info(max_num_rows=64, max_model_len=2048, max_num_batched_tokens=4096)
decode = bounded_plan(worker_pb2.ExecuteStepsRequest.FromString, INFO)


def request(**changes: object) -> worker_pb2.ExecuteStepsRequest:
    return worker_pb2.ExecuteStepsRequest(plan=worker_pb2.StepPlan(**changes))  # type: ignore[arg-type]


def test_the_largest_plan_of_a_batch_is_decoded() -> None:
    count = INFO.max_model_len
    sampling = RowSampling(0.5, 2**32 - 1, 0.5, 0.5, 2**64 - 1, 2**32 - 1, 20)
    ids = np.full(count, INFO.vocab_size - 1, np.int32)
    rows = np.arange(INFO.max_num_rows, dtype=np.int32)
    blocks = np.full(INFO.max_num_batched_tokens, 2**31 - 1, np.int32)
    plan = StepPlan(
        2**63,
        removed_rows=rows,
        added_rows=tuple(NewRow(row, 2**63, ids, count, count - 1, count, ids, sampling) for row in rows.tolist()),
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
        worker_pb2.ExecuteStepsRequest(open=worker_pb2.OpenSession(scheduler_id="x" * 200_000)),
    ],
    ids=["rows", "counts", "added rows", "a long row", "opening"],
)
def test_what_no_batch_needs_is_refused(message: worker_pb2.ExecuteStepsRequest) -> None:
    with pytest.raises(InvalidPlan, match="larger than any plan"):
        decode(message.SerializeToString())


def test_bytes_that_are_no_message_are_an_error_like_any_other() -> None:
    with pytest.raises(DecodeError):
        decode(b"\xff" * (SMALL_BYTES + 1))
