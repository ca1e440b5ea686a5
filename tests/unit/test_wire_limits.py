"""Requests measured before they are decoded, against protobuf's own decoding."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from scheduler_service.wire_limits import MAX_OTHER_BYTES, TooLargeToDecode, _is_mostly_prompt, bounded
from tandem.v1 import inference_pb2
from tests.contract.services import stream_request

decode = bounded(inference_pb2.GenerateStreamRequest.FromString)


def test_a_long_prompt_is_decoded() -> None:
    for prompt in ("x" * 3_000_000, range(1000, 400_000)):
        request = stream_request(prompt, stop_strings=["x" * 1000] * 8, cache_salt="x" * 1000, priority=-5)
        assert decode(request.SerializeToString()) == request


@pytest.mark.parametrize("field", ["stop_strings", "model", "unknown", "parts"])
def test_what_is_long_beside_the_prompt_is_not_decoded(field: str) -> None:
    if field == "unknown":
        data = b"\xfa\x01" + b"\xe0\xa7\x12" + b"\0" * 300_000
    elif field == "parts":
        data = inference_pb2.GenerateStreamRequest(num_choices=1).SerializeToString() * 200_000
    else:
        value = [""] * 200_000 if field == "stop_strings" else "x" * 300_000
        data = stream_request(**{field: value}).SerializeToString()
    assert isinstance(decode(data), TooLargeToDecode)


@given(st.binary(max_size=200))
def test_any_bytes_have_a_measure_or_are_no_message(data: bytes) -> None:
    try:
        assert _is_mostly_prompt(data) in (True, False)
    except DecodeError:
        with pytest.raises(DecodeError):
            inference_pb2.GenerateStreamRequest.FromString(data)


def test_the_longest_fields_that_are_allowed_are_decoded() -> None:
    request = stream_request([1], model="x" * 255, request_id="é" * 128, cache_salt="x" * 1024)
    request.stopping.stop_strings.extend(["\U0001f600" * 128] * 64)
    request.stopping.stop_token_ids.extend([2**32 - 1] * 128)
    data = request.SerializeToString()
    assert len(data) < MAX_OTHER_BYTES and decode(data) == request
