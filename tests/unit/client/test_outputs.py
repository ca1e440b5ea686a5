"""What LLM makes of a reply."""

import pytest

from tandem.outputs import Logprob, PromptsFailed, read_reply
from tandem.v1 import inference_pb2
from tandem_shared.errors import FieldViolation, InvalidRequest

REPLY = inference_pb2.GenerateResponse(
    request_id="r",
    choices=[
        inference_pb2.Choice(
            choice_index=0,
            text="ab",
            token_ids=[7, 9],
            logprobs=[
                inference_pb2.TokenLogprob(
                    token_id=7,
                    logprob=-1.5,
                    rank=3,
                    text="a",
                    top=[inference_pb2.TopLogprob(token_id=8, logprob=-0.5, text="x")],
                    requested=[
                        inference_pb2.TopLogprob(token_id=7, logprob=-1.5, text="a"),
                        inference_pb2.TopLogprob(token_id=2, logprob=-9, text="y"),
                    ],
                ),
                inference_pb2.TokenLogprob(
                    token_id=9,
                    logprob=-0.25,
                    rank=1,
                    text="b",
                    top=[inference_pb2.TopLogprob(token_id=9, logprob=-0.25, text="b")],
                ),
            ],
            finish=inference_pb2.Finish(reason=inference_pb2.FINISH_REASON_STOP, stop_string="b"),
        ),
        inference_pb2.Choice(choice_index=1, finish={"reason": inference_pb2.FINISH_REASON_LENGTH}),
        inference_pb2.Choice(choice_index=2, finish={"reason": inference_pb2.FINISH_REASON_STOP, "stop_token_id": 0}),
    ],
    usage=inference_pb2.Usage(num_prompt_tokens=2, num_cached_tokens=1, num_output_tokens=2),
    prompt_logprobs=[inference_pb2.TokenLogprob(token_id=5, logprob=-2, rank=4, text="p")],
)


def test_a_reply_reads_as_vllms_and_as_nano_vllms() -> None:
    output = read_reply(REPLY, "text", [4, 5], has_prompt_logprobs=True)
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "text", [4, 5])
    assert output.num_cached_tokens == 1 and output.finished
    assert output["text"] == output.outputs[0].text == "ab"
    assert output["token_ids"] == output.outputs[0].token_ids == [7, 9]
    assert type(output["token_ids"]) is list
    assert [each.index for each in output.outputs] == [0, 1, 2]
    assert [each.finish_reason for each in output.outputs] == ["stop", "length", "stop"]
    assert [each.stop_reason for each in output.outputs] == ["b", None, 0]
    assert output.outputs[0].cumulative_logprob == -1.75
    assert output.outputs[0].logprobs == [
        {7: Logprob(-1.5, 3, "a"), 8: Logprob(-0.5, 1, "x"), 2: Logprob(-9.0, None, "y")},
        {9: Logprob(-0.25, 1, "b")},
    ]
    assert output.outputs[1].logprobs is None and output.outputs[1].cumulative_logprob is None
    assert output.prompt_logprobs == [None, {5: Logprob(-2.0, 4, "p")}]


def test_log_probabilities_that_were_not_asked_for_are_none() -> None:
    assert read_reply(REPLY, None, [4, 5], has_prompt_logprobs=False).prompt_logprobs is None


def test_an_unknown_key_says_which_there_are() -> None:
    with pytest.raises(KeyError, match="'logits': an output has 'text' and 'token_ids'"):
        read_reply(REPLY, None, [], has_prompt_logprobs=False)["logits"]


def test_failed_prompts_are_named_by_their_index() -> None:
    error = InvalidRequest(FieldViolation("prompt", "is empty"))
    failed = PromptsFailed({4: error, 2: error}, [None] * 6)
    assert str(failed) == "2 of 6 prompts failed; prompts[2]: prompt: is empty"
