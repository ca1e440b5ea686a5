"""Bad input over real gRPC: the status, the fields that BadRequest names, and that the next request works."""

import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from tandem.v1 import inference_pb2
from tests.contract.services import (
    VOCAB_SIZE,
    Services,
    details,
    model_info,
    stream_request,
    true_tokens,
    violations,
)
from tests.support.fake_worker import FakeRunner

MAX_MODEL_LEN = 512
NUM_BLOCKS = 17
"""Besides the padding block there are 16 blocks of 16 tokens: less than the context, so a request can outgrow the
pool."""


@pytest_asyncio.fixture
async def services() -> AsyncIterator[Services]:
    async with Services(FakeRunner(model_info(max_model_len=MAX_MODEL_LEN, num_blocks=NUM_BLOCKS))) as services:
        yield services


async def refusal(services: Services, request: inference_pb2.GenerateStreamRequest) -> grpc.aio.AioRpcError:
    """The error that a request gets, which must be the same for a stream and a unary call. Then checks that the next
    request works and nothing is left behind.
    """
    errors = []
    for call in (services.stream, services.generate):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request)
        errors.append(caught.value)
    assert errors[0].code() == errors[1].code() and errors[0].details() == errors[1].details()
    good = stream_request()
    assert (await services.stream(good)).token_ids == true_tokens(good)
    load = await services.load()
    assert load.num_waiting_sequences == load.num_running_sequences == load.num_used_blocks == 0
    return errors[0]


BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("prompt.text", {"prompt": ""}),
    ("prompt.token_ids", {"prompt": []}),
    ("prompt.token_ids", {"prompt": [1, VOCAB_SIZE]}),
    ("prompt.token_ids", {"prompt": [2**32 - 1]}),
    ("prompt.token_ids", {"prompt": [1] * MAX_MODEL_LEN}),
    ("prompt.token_ids", {"prompt": [1] * (MAX_MODEL_LEN + 100), "max_tokens": None}),
    ("prompt.text", {"prompt": "a word " * MAX_MODEL_LEN}),
    ("sampling.temperature", {"temperature": -0.1}),
    ("sampling.temperature", {"temperature": math.nan}),
    ("sampling.temperature", {"temperature": math.inf}),
    ("sampling.top_p", {"top_p": 0.0}),
    ("sampling.top_p", {"top_p": 1.01}),
    ("sampling.top_p", {"top_p": math.nan}),
    ("sampling.min_p", {"min_p": -0.01}),
    ("sampling.min_p", {"min_p": 1.01}),
    ("sampling.min_p", {"min_p": math.nan}),
    ("stopping.max_tokens", {"max_tokens": 0}),
    ("stopping.max_tokens", {"max_tokens": MAX_MODEL_LEN - 2}),
    ("stopping.max_tokens", {"max_tokens": 2**32 - 1}),
    ("stopping.stop_strings[1]", {"stop_strings": ["fine", ""]}),
    ("stopping.stop_strings[0]", {"stop_strings": ["x" * 1025]}),
    ("stopping.stop_strings", {"stop_strings": [str(number) for number in range(65)]}),
    ("stopping.stop_token_ids[0]", {"stop_token_ids": [VOCAB_SIZE]}),
    ("sampling.presence_penalty", {"presence_penalty": -2.5}),
    ("sampling.frequency_penalty", {"frequency_penalty": math.nan}),
    ("sampling.repetition_penalty", {"repetition_penalty": 0.0}),
    ("sampling.logit_bias[7]", {"logit_bias": {7: math.inf}}),
    ("sampling.logit_bias", {"logit_bias": dict.fromkeys(range(1025), 1.0)}),
    ("sampling.bad_words[1]", {"bad_words": ["fine", ""]}),
    ("sampling.allowed_token_ids", {"allowed_token_ids": [VOCAB_SIZE]}),
    ("sampling.allowed_token_ids", {"allowed_token_ids": [1] * 16_385}),
    ("stopping.min_tokens", {"min_tokens": 9}),
    ("stopping.min_tokens", {"min_tokens": 2**32 - 1, "max_tokens": None}),
    ("output.num_logprobs", {"num_logprobs": 21}),
    ("output.num_prompt_logprobs", {"num_prompt_logprobs": 21}),
    ("output.logprob_token_ids", {"logprob_token_ids": [1, 1]}),
    ("num_choices", {"num_choices": 0}),
    ("num_choices", {"num_choices": 65}),
    ("model", {"model": "another"}),
    # This fits the context but not the pool: 250 prompt and 20 output tokens need 17 blocks.
    ("prompt", {"prompt": [1] * 250, "max_tokens": 20}),
]


@pytest.mark.parametrize(("field", "changes"), BAD_FIELDS, ids=[f"{f}-{str(c)[:40]}" for f, c in BAD_FIELDS])
async def test_a_bad_field_is_named(services: Services, field: str, changes: dict[str, Any]) -> None:
    error = await refusal(services, stream_request(**changes))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations(error)) == [field]
    assert all(violations(error).values())
    assert details(error).message == error.details()


async def test_a_prompt_of_both_or_neither_kind_is_refused(services: Services) -> None:
    both = stream_request([1, 2])
    both.prompt.text = "words"
    for request in (both, inference_pb2.GenerateStreamRequest()):
        error = await refusal(services, request)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert list(violations(error)) == ["prompt"]


async def test_all_violations_are_told_at_once(services: Services) -> None:
    request = stream_request([], 0, temperature=-1.0, top_p=2.0, min_p=2.0, num_choices=0, num_logprobs=99, model="x")
    assert set(violations(await refusal(services, request))) == {
        "prompt.token_ids",
        "stopping.max_tokens",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.min_p",
        "num_choices",
        "output.num_logprobs",
        "model",
    }


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model", {"model": "x" * 200_000}),
        ("model", {"model": "\u4e16" * 20_000}),
        ("stopping.stop_token_ids", {"stop_token_ids": [VOCAB_SIZE] * 2000}),
        ("stopping.stop_strings", {"stop_strings": [""] * 2000}),
    ],
    ids=["long name", "long name that is not ASCII", "stop ids", "stop strings"],
)
async def test_an_error_that_has_much_to_say_is_cut_to_what_a_client_takes(
    services: Services, field: str, changes: dict[str, Any]
) -> None:
    error = await refusal(services, stream_request(**changes))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in violations(error)
    assert details(error).message == error.details()


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": [1] * (MAX_MODEL_LEN - 1), "max_tokens": 1},
        {"prompt": [0, VOCAB_SIZE - 1]},
        {"top_p": 1.0, "min_p": 1.0, "top_k": 2**32 - 1},
        {"temperature": 100.0, "seed": 2**64 - 1},
        {"num_logprobs": 20, "num_choices": 64, "max_tokens": 2},
        {"priority": -(2**31), "cache_salt": "salt", "model": "embedded"},
        {"stop_token_ids": [0, VOCAB_SIZE - 1], "stop_strings": [str(number) * 4 for number in range(64)]},
    ],
    ids=lambda changes: ",".join(changes),
)
async def test_the_limits_themselves_are_fine(changes: dict[str, Any]) -> None:
    async with Services(FakeRunner(model_info(max_model_len=MAX_MODEL_LEN))) as services:
        output = await services.stream(stream_request(**changes))
    assert all(choice.finish is not None for choice in output.choices.values())


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Tokenize"])
async def test_bytes_that_are_no_message_are_refused(services: Services, method: str) -> None:
    path, garbage = f"/tandem.v1.InferenceService/{method}", b"\xff\xff\xff"
    channel = services.channel
    reply = (
        anext(aiter(channel.unary_stream(path)(garbage)))
        if method == "GenerateStream"
        else channel.unary_unary(path)(garbage)
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reply
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations(caught.value)) == [""]
    good = stream_request()
    assert (await services.stream(good)).token_ids == true_tokens(good)


async def test_tokenize_and_detokenize_check_what_they_get(services: Services) -> None:
    calls = [
        (services.inference.Tokenize, inference_pb2.TokenizeRequest(text="words", model="another"), "model"),
        (services.inference.Detokenize, inference_pb2.DetokenizeRequest(token_ids=[1], model="another"), "model"),
        (services.inference.Detokenize, inference_pb2.DetokenizeRequest(token_ids=[VOCAB_SIZE]), "token_ids"),
    ]
    for method, request, field in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(request)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert list(violations(caught.value)) == [field]


async def test_the_served_name_is_the_schedulers_setting() -> None:
    async with Services(served_model_name="mine") as services:
        assert (await services.generate(stream_request(model="mine"))).model == "mine"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.generate(stream_request(model="embedded"))
    assert list(violations(caught.value)) == ["model"]
