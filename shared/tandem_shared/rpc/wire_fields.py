"""Walks the fields of an encoded protobuf message without decoding them, by the lengths that stand before them.

So a message that would take long to decode, or become much larger in memory, can be refused undecoded.
"""

from collections.abc import Iterator

from google.protobuf.message import DecodeError, Message

VARINT, LENGTH_DELIMITED = 0, 2
FIXED_SIZES = {1: 8, 5: 4}
"""The size in bytes of the fields of fixed size, by wire type. Groups have no size of their own."""


class TooManyFields(Exception):
    """A message has more fields than were asked for."""


def tags(message: type[Message], *names: str) -> tuple[int, ...]:
    """The tags of a message's fields of these names: texts, bytes, messages or packed numbers."""
    return tuple(message.DESCRIPTOR.fields_by_name[name].number << 3 | LENGTH_DELIMITED for name in names)


def fields(data: bytes, position: int, end: int, max_fields: int) -> Iterator[tuple[int, int, int]]:
    """Yields tag, start and end of each field in data[position:end]. start is behind the tag and the length. Raises
    TooManyFields after max_fields fields, and DecodeError if the data is not a message.
    """
    for _ in range(max_fields):
        if position >= end:
            return
        tag, start = _varint(data, position)
        kind = tag & 7
        if kind in (VARINT, LENGTH_DELIMITED):
            number, start = _varint(data, start)
            position = start + number if kind == LENGTH_DELIMITED else start
        else:
            position = start + FIXED_SIZES.get(kind, 0)
        yield tag, start, position
    if position < end:
        raise TooManyFields


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at a position, and the position behind it."""
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
