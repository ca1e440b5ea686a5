"""What crosses the stream between a front-end process and the engine arrives as it was, through real protobuf."""

from dataclasses import replace

import numpy as np

from tandem.internal.v1 import engine_pb2
from tandem_scheduler.core.types import FinishReason
from tandem_scheduler.engine_interface import OutputBatch, SequenceEnd, Submission, TraceContext
from tandem_scheduler.processes.engine_codec import (
    decode_outputs,
    decode_submit,
    encode_outputs,
    encode_submit,
    handles_in,
)
from tandem_shared.errors import FieldViolation, InvalidRequest
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import Grammar, SamplingLists
from tandem_shared.step_plan import RowLogprobs
from tests.support.builders import create_request, plain, prompt_logprobs


def test_outputs() -> None:
    batch = OutputBatch(
        [1, 2, 1],
        [10, 20, 11],
        [
            (1, RowLogprobs(0, -0.5, (10, 11), (-0.5, -1.5), 1, ())),
            (2, RowLogprobs(0, -2.0, (), (), 7, (-0.25, -8.0))),
            (1, RowLogprobs(0, -1.0, (11,), (-1.0,), 2, (-4.0,))),
        ],
        [SequenceEnd(2, FinishReason.LENGTH, 3)],
        [
            (4, prompt_logprobs(0, 1, (-0.5, -1.5), (1, 9), 1, (7, 8), (-0.5, -0.25))),
            (4, prompt_logprobs(0, 3, (-2.5,), (4,))),
        ],
    )
    message = engine_pb2.AttachResponse.FromString(encode_outputs(batch).SerializeToString())
    assert plain(decode_outputs(message)) == plain(batch)
    assert set(handles_in(message)) == set(batch.handles) == {1, 2, 4}


def test_a_batch_of_prompt_reports_alone_is_news_and_is_added_behind_what_came_before() -> None:
    first, second = ((3, prompt_logprobs(0, position, (-1.0,), (1,))) for position in (1, 2))
    batch = OutputBatch(prompt_logprobs=[first])
    assert batch
    batch.extend(OutputBatch(prompt_logprobs=[second]))
    assert plain(batch.prompt_logprobs) == plain([first, second])


def test_the_error_of_a_request_stays_one() -> None:
    error = InvalidRequest(FieldViolation("structured_output", "the grammar failed"))
    batch = OutputBatch(ends=[SequenceEnd(1, FinishReason.ERROR, 0, error=error)])
    [end] = decode_outputs(encode_outputs(batch)).ends
    assert isinstance(end.error, InvalidRequest) and end.error.violations == error.violations


def test_a_submission() -> None:
    lists = SamplingLists(
        stop_token_ids=(1, 2),
        logit_bias=((3, 0.5),),
        allowed_token_ids=(4,),
        bad_words=((5, 6), (7,)),
        logprob_token_ids=(8,),
        grammar=Grammar("start: /a/", 9, True),
    )
    sampling = RowSampling(presence_penalty=0.5, repetition_penalty=1.25, min_tokens=3, num_prompt_logprobs=0)
    request = create_request(0, sampling=sampling, lists=lists, stop_token_ids=[1, 2])
    for trace in (None, TraceContext("service/Method"), TraceContext("service/Method", "00-ab-cd-01", "a=b")):
        submission = Submission("request", 7, request, 2, "fake-model", trace)
        message = engine_pb2.SubmitRequest.FromString(encode_submit(submission).SerializeToString())
        got = decode_submit(message)
        assert np.array_equal(got.first.prompt_token_ids, request.prompt_token_ids)
        prompt = request.prompt_token_ids
        assert replace(got, first=replace(got.first, prompt_token_ids=prompt)) == submission
