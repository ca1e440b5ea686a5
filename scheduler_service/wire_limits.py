"""Generate requests that would take long to decode are refused undecoded.

Decoding a request holds the event loop. A prompt may be as large as a message, and that is limited, but two million
empty stop strings are no larger, and take much longer.
"""

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import DecodeError

from shared.errors import FieldViolation, InvalidRequest
from tandem.v1 import inference_pb2

PROMPT = inference_pb2.GenerateRequest.PROMPT_FIELD_NUMBER

MAX_OTHER_BYTES = 256 * 1024
"""Of all fields but the prompt: the longest stop strings take 32 kB, all else a few."""

MAX_FIELDS = 256
"""Of a request itself. It has nine; they may come in parts."""

LENGTH_DELIMITED = 2

T = TypeVar("T", inference_pb2.GenerateRequest, inference_pb2.GenerateStreamRequest)


class TooLargeToDecode:
    """Stands for a request that was not decoded: an error that is raised while decoding would end as INTERNAL."""

    @staticmethod
    def error() -> InvalidRequest:
        return InvalidRequest(FieldViolation("", f"has more than {MAX_OTHER_BYTES} bytes beside the prompt"))


def bounded(decode: Callable[[bytes], T]) -> Callable[[bytes], T | TooLargeToDecode]:
    """A decoder that looks at the size of a request's fields first."""

    def decode_bounded(data: bytes) -> T | TooLargeToDecode:
        return decode(data) if len(data) <= MAX_OTHER_BYTES or _is_mostly_prompt(data) else TooLargeToDecode()

    return decode_bounded


def _is_mostly_prompt(data: bytes) -> bool:
    position, num_other = 0, 0
    for _ in range(MAX_FIELDS):
        if position >= len(data):
            return num_other <= MAX_OTHER_BYTES
        start = position
        tag, position = _varint(data, position)
        if tag & 7 != LENGTH_DELIMITED:
            # The request's numbers are varints; of other types there are none.
            _, position = _varint(data, position)
        else:
            length, position = _varint(data, position)
            position += length
        if tag >> 3 != PROMPT:
            num_other += position - start
    return False


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise DecodeError("a number does not end")
