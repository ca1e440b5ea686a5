"""Requests of vllm.grpc.engine.VllmEngine: measured before they are decoded, and what becomes of each field."""

import pytest
from smg_grpc_proto import vllm_engine_pb2

from tandem_scheduler.front_end.generation_params import GenerationParams
from tandem_scheduler.front_end.grpc_api.vllm_engine_codec import bounded_vllm_generate, vllm_params_of
from tandem_scheduler.front_end.grpc_api.vllm_engine_servicer import _Rate
from tandem_scheduler.front_end.grpc_api.wire_limits import MAX_OTHER_BYTES, TooLargeToDecode

Request, Sampling = vllm_engine_pb2.GenerateRequest, vllm_engine_pb2.SamplingParams
MAX_NUM_IDS = 500_000

decode = bounded_vllm_generate(Request.FromString, lambda: MAX_NUM_IDS)


def tokenized(ids: range | list[int], text: str = "") -> vllm_engine_pb2.TokenizedInput:
    return vllm_engine_pb2.TokenizedInput(input_ids=ids, original_text=text)


def test_a_long_prompt_with_the_longest_lists_is_decoded() -> None:
    lists = {"stop": ["x" * 128] * 64, "stop_token_ids": range(128), "logit_bias": dict.fromkeys(range(1024), 1.0)}
    for prompt in ({"text": "x" * 3_000_000}, {"tokenized": tokenized(range(1000, 400_000), "x" * 3_000_000)}):
        for grammar in ({}, {"json_schema": "x" * 1_000_000}):
            request = Request(sampling_params=Sampling(**lists, **grammar), **prompt)
            assert decode(request.SerializeToString()) == request


@pytest.mark.parametrize(
    "request_",
    [
        Request(sampling_params=Sampling(stop=[""] * 500_000)),
        Request(sampling_params=Sampling(logit_bias=dict.fromkeys(range(200_000), 1.0))),
        Request(request_id="x" * 900_000),
        Request(mm_inputs=vllm_engine_pb2.MultimodalInputs(mm_hashes=["x"] * 300_000)),
    ],
    ids=["stop", "logit_bias", "request_id", "mm_inputs"],
)
def test_what_is_long_beside_the_prompt_is_not_decoded(request_: Request) -> None:
    refused = decode(request_.SerializeToString())
    assert isinstance(refused, TooLargeToDecode) and "beside the prompt" in str(refused.error)


def test_ids_that_must_be_too_many_are_not_decoded() -> None:
    refused = decode(Request(tokenized=tokenized([2**32 - 1] * (MAX_NUM_IDS + MAX_OTHER_BYTES))).SerializeToString())
    assert isinstance(refused, TooLargeToDecode) and refused.violation.field == "tokenized.input_ids"


def params_of(**sampling: object) -> GenerationParams:
    return vllm_params_of(Request(sampling_params=Sampling(**sampling)), 1000, None)


def test_each_field_has_its_place() -> None:
    params = params_of(
        temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, frequency_penalty=1, presence_penalty=-1,
        repetition_penalty=2, max_tokens=9, min_tokens=3, stop=["a"], stop_token_ids=[4], skip_special_tokens=True,
        ignore_eos=True, n=2, logprobs=0, prompt_logprobs=0, seed=5, include_stop_str_in_output=True,
        logit_bias={8: 0.5}, json_object=True,
    )  # fmt: skip
    assert params.sampling == {
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "frequency_penalty": 1, "presence_penalty": -1,
        "repetition_penalty": 2, "seed": 5,
    }  # fmt: skip
    assert (params.max_tokens, params.min_tokens, params.num_choices, params.max_reply_bytes) == (9, 3, 2, 1000)
    assert (list(params.stop_strings), list(params.stop_token_ids), dict(params.logit_bias)) == (["a"], [4], {8: 0.5})
    assert params.skip_special_tokens and params.ignore_eos and params.include_stop_string
    assert (params.num_logprobs, params.num_prompt_logprobs) == (0, 0)
    assert params.structured_output is not None and params.structured_output.json_object


def test_what_is_left_out_is_the_models_or_off() -> None:
    params = params_of(min_tokens=0)
    # As vLLM has it, a top_k and a min_p of 0 are off. What can be no value is left to the model's defaults.
    assert params.sampling == {"top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert (params.max_tokens, params.num_choices, params.structured_output) == (None, 1, None)
    assert (params.num_logprobs, params.num_prompt_logprobs, params.skip_special_tokens) == (None, None, False)
    assert vllm_params_of(Request(text="x", stream=True), 1000, 5.0) == GenerationParams(
        prompt_text="x", logit_bias={}, stop_strings=[], stop_token_ids=[], skip_special_tokens=False, deadline=5.0
    )
    assert params_of(json_object=False).structured_output is None


@pytest.mark.parametrize(
    ("seed", "expected"), [(0, 0), (2**31 - 1, 2**31 - 1), (-1, 2**64 - 1), (-(2**31), 2**64 - 2**31)]
)
def test_every_int32_is_a_seed_of_its_own(seed: int, expected: int) -> None:
    assert params_of(seed=seed).sampling["seed"] == expected


def test_the_rate_is_that_of_the_last_second_or_more() -> None:
    rate = _Rate()
    assert rate.update(1000, 50.0) == 0
    assert rate.update(1010, 50.5) == 0
    assert rate.update(1100, 52.0) == 50
    assert rate.update(2000, 52.5) == 50
    assert rate.update(1100, 53.0) == 0
