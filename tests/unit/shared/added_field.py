"""Follows typical_p, from -2 to 2, from the client to the device. test_sampling_fields.py runs this file in a
copy of the code that has such a field.
"""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from tandem.cli import build_parser
from tandem.internal.v1 import engine_pb2, worker_pb2
from tandem.sampling_params import SamplingParams
from tandem.v1 import inference_pb2
from tandem_scheduler.core.types import SequenceRequest
from tandem_scheduler.engine_interface import Submission
from tandem_scheduler.front_end.grpc_api.request_codec import params_of
from tandem_scheduler.front_end.validation import check_request
from tandem_scheduler.processes.engine_codec import decode_submit, encode_submit
from tandem_shared.errors import InvalidPlan, InvalidRequest
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_codec import decode_plan, encode_plan
from tandem_shared.step_plan import NewRow, StepPlan, WorkerInfo
from tandem_worker.runners.batch import Batch
from tandem_worker.runners.row_options import RowOptions

WORKER = WorkerInfo(2, "", "", "", "", "", 100, 64, 9, 16, 4, 64)


def check(sampling: inference_pb2.SamplingParams) -> SequenceRequest:
    """What the front end makes of a request, after the message between its process and the engine."""
    prompt = inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=[1, 2]))
    params = params_of(inference_pb2.GenerateRequest(prompt=prompt, sampling=sampling), None)
    encoder: Any = None  # unused, as the prompt is token ids
    request = asyncio.run(check_request(params, encoder, WORKER, ""))
    message = encode_submit(Submission("", 0, request.first, 1, "")).SerializeToString()
    return decode_submit(engine_pb2.SubmitRequest.FromString(message)).first


def plan(sampling: RowSampling) -> StepPlan:
    """A plan that adds row 3, as the worker gets it."""
    ids = np.array([1, 2], np.int32)
    row = NewRow(3, 1, ids, 2, 0, 0, np.array([1], np.int32), sampling)
    sent = StepPlan(1, added_rows=(row,), chunk_rows=np.array([3]), chunk_num_tokens=np.array([2]))
    return decode_plan(worker_pb2.StepPlan.FromString(encode_plan(sent).SerializeToString()))


def main() -> None:
    with pytest.raises(InvalidRequest, match=r"^typical_p: must be a number in \[-2, 2\], is 3$"):
        SamplingParams(typical_p=3)
    with pytest.raises(InvalidRequest, match=r"^sampling\.typical_p: must be in \[-2, 2\], is 2\.5$"):
        check(inference_pb2.SamplingParams(typical_p=2.5))
    batch = Batch(num_rows=4, num_blocks=9, block_size=16, max_model_len=64, max_num_batched_tokens=64, vocab_size=100)
    with pytest.raises(InvalidPlan, match=r"typical_p -2\.5"):
        batch.apply(plan(RowSampling(typical_p=-2.5)))

    options = build_parser().parse_args(["generate", "text", "--typical-p", "-1.5"])
    asked = check(SamplingParams(typical_p=options.typical_p).sampling()).sampling
    assert asked.typical_p == -1.5
    assert check(inference_pb2.SamplingParams()).sampling.typical_p == 0
    rows = RowOptions(4, torch.device("cpu"))
    rows.set(plan(asked).added_rows)
    assert rows.on_device["typical_p"].tolist() == [0, 0, 0, -1.5]
    # A sampler that does not read the field goes on as before.
    assert rows.of(torch.tensor([3]), torch.tensor([2])).top_p.tolist() == [1]
    print("told, checked and on the device")


if __name__ == "__main__":
    main()
