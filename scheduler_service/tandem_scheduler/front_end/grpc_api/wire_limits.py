"""Requests that would take long to decode are refused undecoded.

Decoding a request holds the event loop. A text may be as large as a message, as it is only copied. But four million ids
or two million empty stop strings are no larger, and take much longer. So what is not text is measured first: by the
lengths that stand before a message's fields, without a look into them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tandem.v1 import inference_pb2
from tandem_shared.errors import FieldViolation, InvalidRequest
from tandem_shared.rpc.wire_fields import LENGTH_DELIMITED, TooManyFields, fields

MAX_OTHER_BYTES = 256 * 1024
"""The limit of all fields but the prompt together: the longest stop strings take 32 kB, all else a few bytes."""

MAX_ID_BYTES = 5
"""The most bytes of one id in a packed field."""

MAX_FIELDS = 256
"""The most fields on the wire of a request or of a prompt. They have nine and two, but a field may come in parts."""

PROMPT_TAG = inference_pb2.GenerateRequest.PROMPT_FIELD_NUMBER << 3 | LENGTH_DELIMITED
TEXT_TAG = inference_pb2.Prompt.TEXT_FIELD_NUMBER << 3 | LENGTH_DELIMITED
TOKENIZE_TEXT_TAG = inference_pb2.TokenizeRequest.TEXT_FIELD_NUMBER << 3 | LENGTH_DELIMITED
DETOKENIZE_IDS_TAG = inference_pb2.DetokenizeRequest.TOKEN_IDS_FIELD_NUMBER << 3 | LENGTH_DELIMITED

T = TypeVar("T")


@dataclass(frozen=True)
class TooLargeToDecode:
    """Stands for a request that was not decoded: an error that is raised while decoding would end as INTERNAL."""

    violation: FieldViolation

    @property
    def error(self) -> InvalidRequest:
        return InvalidRequest(self.violation)


def bounded_generate(
    decode: Callable[[bytes], T], max_num_ids: Callable[[], int]
) -> Callable[[bytes], T | TooLargeToDecode]:
    """A decoder of either generate request that measures it first. max_num_ids gives how many ids a prompt may have."""

    def decode_bounded(data: bytes) -> T | TooLargeToDecode:
        # A message that is small as a whole needs no measuring.
        violation = _violation(data, max_num_ids()) if len(data) > MAX_OTHER_BYTES else None
        return decode(data) if violation is None else TooLargeToDecode(violation)

    return decode_bounded


def bounded_detokenize(
    decode: Callable[[bytes], T], max_num_ids: Callable[[], int]
) -> Callable[[bytes], T | TooLargeToDecode]:
    """A decoder of a request of ids and little else. The ids come packed, as protobuf clients send them."""

    def decode_bounded(data: bytes) -> T | TooLargeToDecode:
        limit = max_num_ids()
        if _has_too_many(len(data), limit):
            return TooLargeToDecode(_too_many("token_ids", limit))
        violation = _violation_beside(data, DETOKENIZE_IDS_TAG, "ids")
        return decode(data) if violation is None else TooLargeToDecode(violation)

    return decode_bounded


def bounded_tokenize(decode: Callable[[bytes], T]) -> Callable[[bytes], T | TooLargeToDecode]:
    """A decoder of a request of one text and little else."""

    def decode_bounded(data: bytes) -> T | TooLargeToDecode:
        violation = _violation_beside(data, TOKENIZE_TEXT_TAG, "text")
        return decode(data) if violation is None else TooLargeToDecode(violation)

    return decode_bounded


def _violation(data: bytes, max_num_ids: int) -> FieldViolation | None:
    num_other = num_id_bytes = 0
    try:
        for tag, start, end in fields(data, 0, len(data), MAX_FIELDS):
            if tag == PROMPT_TAG:
                num_id_bytes += sum(
                    stop - at for part, at, stop in fields(data, start, end, MAX_FIELDS) if part != TEXT_TAG
                )
            else:
                num_other += end - start
    except TooManyFields:
        num_other = len(data)
    if num_other > MAX_OTHER_BYTES:
        return _beside("prompt")
    return _too_many("prompt.token_ids", max_num_ids) if _has_too_many(num_id_bytes, max_num_ids) else None


def _violation_beside(data: bytes, tag: int, name: str) -> FieldViolation | None:
    """What is wrong with a request that may be long only because of the one field that has this tag."""
    if len(data) <= MAX_OTHER_BYTES:
        return None
    try:
        num_other = sum(end - start for each, start, end in fields(data, 0, len(data), MAX_FIELDS) if each != tag)
    except TooManyFields:
        num_other = len(data)
    return _beside(name) if num_other > MAX_OTHER_BYTES else None


def _beside(name: str) -> FieldViolation:
    return FieldViolation("", f"has more than {MAX_OTHER_BYTES} bytes beside the {name}")


def _has_too_many(num_bytes: int, max_num_ids: int) -> bool:
    return num_bytes > MAX_OTHER_BYTES + max_num_ids * MAX_ID_BYTES


def _too_many(field: str, max_num_ids: int) -> FieldViolation:
    return FieldViolation(field, f"has more bytes than {max_num_ids} ids")
