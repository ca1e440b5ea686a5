"""Requests measured before they are decoded, against protobuf's own decoding."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from tandem.v1 import inference_pb2
from tandem_scheduler.front_end.grpc_api.wire_limits import (
    MAX_OTHER_BYTES,
    TooLargeToDecode,
    _violation,
    bounded_detokenize,
    bounded_generate,
    bounded_tokenize,
)
from tandem_shared.rpc.wire_fields import TooManyFields, fields
from tests.contract.services import stream_request

MAX_NUM_IDS = 500_000

decode = bounded_generate(inference_pb2.GenerateStreamRequest.FromString, lambda: MAX_NUM_IDS)


def test_a_long_prompt_is_decoded() -> None:
    for prompt in ("x" * 3_000_000, range(1000, 400_000)):
        request = stream_request(prompt, stop_strings=["x" * 1000] * 8, cache_salt="x" * 1000, priority=-5)
        assert decode(request.SerializeToString()) == request


@pytest.mark.parametrize("field", ["stop_strings", "model", "unknown", "parts"])
def test_what_is_long_beside_the_prompt_is_not_decoded(field: str) -> None:
    if field == "unknown":
        data = b"\xfa\x01" + b"\xa0\xf7\x36" + b"\0" * 900_000
    elif field == "parts":
        data = inference_pb2.GenerateStreamRequest(num_choices=1).SerializeToString() * 500_000
    else:
        value = [""] * 500_000 if field == "stop_strings" else "x" * 900_000
        data = stream_request(**{field: value}).SerializeToString()
    refused = decode(data)
    assert isinstance(refused, TooLargeToDecode) and "beside the prompt" in str(refused.error)


def test_ids_that_must_be_too_many_are_not_decoded() -> None:
    refused = decode(stream_request([2**32 - 1] * (MAX_NUM_IDS + MAX_OTHER_BYTES)).SerializeToString())
    assert isinstance(refused, TooLargeToDecode) and refused.violation.field == "prompt.token_ids"
    in_parts = stream_request([1] * 20_000).SerializeToString() * 200
    assert isinstance(decode(in_parts), TooLargeToDecode)
    decode_ids = bounded_detokenize(inference_pb2.DetokenizeRequest.FromString, lambda: 1000)
    request = inference_pb2.DetokenizeRequest(token_ids=[2**32 - 1] * 1000, model="x" * 200)
    assert decode_ids(request.SerializeToString()) == request
    assert isinstance(decode_ids(request.SerializeToString() * 100), TooLargeToDecode)


def chat_request(num_messages: int, content: str, **fields: str) -> inference_pb2.GenerateStreamRequest:
    message = inference_pb2.ChatMessage(role="assistant", content=content, **fields)
    message.tool_calls.add(id="x", name="f", arguments=content)
    chat = inference_pb2.Chat(messages=[message] * num_messages, tools=[content], chat_template_kwargs=content)
    return inference_pb2.GenerateStreamRequest(prompt=inference_pb2.Prompt(chat=chat))


def test_a_long_conversation_is_decoded() -> None:
    tokenize = bounded_tokenize(inference_pb2.TokenizeRequest.FromString)
    for request in (chat_request(1000, "x" * 1500), chat_request(1, "x" * 2_000_000, reasoning_content="x" * 900_000)):
        assert decode(request.SerializeToString()) == request
        chat = inference_pb2.TokenizeRequest(chat=request.prompt.chat)
        assert tokenize(chat.SerializeToString()) == chat


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (chat_request(100_000, ""), "messages, tools and their fields"),
        (chat_request(1, "", name="x" * 900_000), "bytes beside"),
    ],
    ids=["fields", "bytes"],
)
def test_a_conversation_that_takes_long_to_decode_is_not_decoded(
    request_: inference_pb2.GenerateStreamRequest, reason: str
) -> None:
    refused = decode(request_.SerializeToString())
    assert isinstance(refused, TooLargeToDecode) and reason in str(refused.error)
    chat = inference_pb2.TokenizeRequest(chat=request_.prompt.chat)
    in_parts = chat.SerializeToString() * 3
    refused = bounded_tokenize(inference_pb2.TokenizeRequest.FromString)(in_parts)
    assert isinstance(refused, TooLargeToDecode) and reason in str(refused.error)


@pytest.mark.parametrize("data", [b"\x7a\0", b"\x0a\0", b"\x12\0"], ids=["unknown", "text or ids", "model"])
def test_a_request_to_tokenize_or_detokenize_in_many_parts_is_not_decoded(data: bytes) -> None:
    """Empty fields take two bytes and no memory, but each takes time to decode."""
    tokenize = bounded_tokenize(inference_pb2.TokenizeRequest.FromString)
    assert isinstance(tokenize(data * 2_000_000), TooLargeToDecode)
    detokenize = bounded_detokenize(inference_pb2.DetokenizeRequest.FromString, lambda: MAX_NUM_IDS)
    assert isinstance(detokenize(data * 1_000_000), TooLargeToDecode)


def test_a_long_text_to_tokenize_is_decoded_and_a_long_model_is_not() -> None:
    tokenize = bounded_tokenize(inference_pb2.TokenizeRequest.FromString)
    request = inference_pb2.TokenizeRequest(text="x" * 3_000_000, model="x" * 255, add_special_tokens=False)
    assert tokenize(request.SerializeToString()) == request
    refused = tokenize(inference_pb2.TokenizeRequest(text="x", model="x" * 300_000).SerializeToString())
    assert isinstance(refused, TooLargeToDecode) and "beside the text" in str(refused.error)


@given(st.binary(max_size=200))
def test_any_bytes_have_a_measure_or_are_no_message(data: bytes) -> None:
    try:
        _violation(data, 0)
    except DecodeError:
        with pytest.raises(DecodeError):
            inference_pb2.GenerateStreamRequest.FromString(data)


def longest_request() -> inference_pb2.GenerateStreamRequest:
    """Each list as long as it may be, of elements that are as long as they may be."""
    request = stream_request([1], model="x" * 255, request_id="é" * 128, cache_salt="x" * 1024)
    request.stopping.stop_strings.extend(["\U0001f600" * 128] * 64)
    request.stopping.stop_token_ids.extend([2**32 - 1] * 128)
    request.sampling.bad_words.extend(["\U0001f600" * 256] * 128)
    request.sampling.allowed_token_ids.extend([2**32 - 1] * 16384)
    for token_id in range(2**32 - 1024, 2**32):
        request.sampling.logit_bias[token_id] = -99.5
    request.output.logprob_token_ids.extend([2**32 - 1] * 20)
    request.structured_output.choice.texts.extend(["\U0001f600" * 128] * 1024)
    return request


def test_the_longest_fields_that_are_allowed_are_decoded() -> None:
    request = longest_request()
    data = request.SerializeToString()
    assert len(data) < MAX_OTHER_BYTES and decode(data) == request


@pytest.mark.parametrize("name", ["json_schema", "regex", "lark"])
def test_the_text_of_a_grammar_is_only_copied_and_may_be_long(name: str) -> None:
    request = longest_request()
    setattr(request.structured_output, name, "x" * 3_000_000)
    assert decode(request.SerializeToString()) == request


def test_choices_by_the_million_are_not_decoded() -> None:
    request = stream_request()
    request.structured_output.choice.texts.extend([""] * 1_000_000)
    refused = decode(request.SerializeToString())
    assert isinstance(refused, TooLargeToDecode) and "beside the prompt and the grammar" in str(refused.error)


@pytest.mark.parametrize(("count", "is_refused"), [(3, False), (4, False), (5, True)])
def test_as_many_fields_as_may_be_are_read(count: int, is_refused: bool) -> None:
    data = inference_pb2.TokenizeResponse(token_ids=[1]).SerializeToString() * count
    if is_refused:
        with pytest.raises(TooManyFields):
            list(fields(data, 0, len(data), 4))
    else:
        assert len(list(fields(data, 0, len(data), 4))) == count
