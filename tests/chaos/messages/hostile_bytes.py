"""Hostile messages as bytes: hypothesis strategies over a message's descriptor. Knows protobuf's wire format, and
nothing of gRPC.

A message is made field by field, so that it can hold what no library would write: unknown fields, wrong wire types,
doubled fields, text that is not UTF-8. Half of the messages are valid ones in which something is changed, since a
message that is wrong throughout is refused by the first check.
"""

import itertools
import random
import struct
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from tests.chaos.messages.hostile_values import FLOATS, INTEGERS, LIMITS, NO_UTF8, TEXTS

VARINT, FIXED64, BYTES, START_GROUP, END_GROUP, FIXED32 = range(6)
MAX_DEPTH = 4
MAX_TURNS = 4
HUGE_BYTES = (300_000, 1_000_000, 5_000_000)
"""Sizes past the point at which checks before decoding stop, well within gRPC's limit of 4 MiB, and past that limit."""

T = FieldDescriptor
VARINTS = {
    T.TYPE_INT32,
    T.TYPE_INT64,
    T.TYPE_UINT32,
    T.TYPE_UINT64,
    T.TYPE_SINT32,
    T.TYPE_SINT64,
    T.TYPE_BOOL,
    T.TYPE_ENUM,
}
FIXED = {T.TYPE_FLOAT: "<f", T.TYPE_DOUBLE: "<d", T.TYPE_FIXED32: "<I", T.TYPE_FIXED64: "<Q"}
FIXED |= {T.TYPE_SFIXED32: "<i", T.TYPE_SFIXED64: "<q"}
UNSIGNED = {T.TYPE_UINT32: 32, T.TYPE_UINT64: 64, T.TYPE_FIXED32: 32, T.TYPE_FIXED64: 64}
SIGNED = {T.TYPE_INT32: 32, T.TYPE_INT64: 64, T.TYPE_SINT32: 32, T.TYPE_SINT64: 64}

integers = st.sampled_from(INTEGERS) | st.integers(0, 300)
floats = st.sampled_from(FLOATS) | st.floats(width=32)
texts = st.sampled_from(TEXTS) | st.text(max_size=30)
ids = st.lists(st.sampled_from([0, 1, 2, 7, 1023, 1024, 2**31 - 1, -1, -(2**31)]), max_size=20).map(
    lambda numbers: struct.pack(f"<{len(numbers)}i", *numbers)
)
blobs = ids | st.binary(max_size=40)


def draw(strategy: st.SearchStrategy[Any], count: int, seed: int) -> list[Any]:
    """`count` values, with few repetitions. The same seed gives the same values with the same release of hypothesis."""
    drawn: dict[Any, None] = {}
    for turn in range(MAX_TURNS):
        num_missing = count - len(drawn)
        if num_missing <= 0:
            break

        @seeded(seed * MAX_TURNS + turn)
        @settings(
            max_examples=num_missing * 3 // 2 + 20,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def collect(value: Any) -> None:
            drawn[value] = None

        collect()
    # hypothesis draws simple values first.
    values = list(drawn)
    random.Random(seed).shuffle(values)
    return list(itertools.islice(itertools.cycle(values), count))


def varint(number: int) -> bytes:
    data = bytearray()
    while number >= 0x80:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def wire_field(number: int, kind: int, payload: bytes) -> bytes:
    length = varint(len(payload)) if kind == BYTES else b""
    return varint(number << 3 | kind) + length + payload


any_field = st.one_of(
    st.builds(lambda number, value: wire_field(number, VARINT, varint(value)), st.integers(1, 40), integers),
    st.builds(lambda number, data: wire_field(number, BYTES, data), st.integers(1, 40), blobs),
    st.builds(
        lambda number, data: wire_field(number, FIXED32, data), st.integers(1, 40), st.binary(min_size=4, max_size=4)
    ),
    st.builds(
        lambda number, data: wire_field(number, FIXED64, data), st.integers(1, 40), st.binary(min_size=8, max_size=8)
    ),
    st.builds(
        lambda number, depth: varint(number << 3 | START_GROUP) * depth + varint(number << 3 | END_GROUP) * depth,
        st.sampled_from([1, 2, 99, 2**29 - 1]),
        st.sampled_from([1, 3, 99, 101, 5000]),
    ),
)
"""Any field: its number may be unknown, and its wire type wrong."""


def fields_of(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[bytes]:
    """A field of the message, of the right type, with any value."""
    known = [
        _known_field(field, depth) for field in descriptor.fields if depth < MAX_DEPTH or field.message_type is None
    ]
    return st.one_of(known) if known else any_field


def well_formed(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[bytes]:
    return st.lists(fields_of(descriptor, depth), max_size=8 - depth).map(b"".join)


def _known_field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[bytes]:
    number = field.number
    if field.message_type is not None:
        inner = well_formed(field.message_type, depth + 1)
        return inner.map(lambda data: wire_field(number, BYTES, data))
    if field.type == T.TYPE_STRING:
        return (texts.map(str.encode) | st.sampled_from(NO_UTF8)).map(lambda data: wire_field(number, BYTES, data))
    if field.type == T.TYPE_BYTES:
        return blobs.map(lambda data: wire_field(number, BYTES, data))
    if field.type in VARINTS:
        one = integers.map(lambda value: varint(value))
        kind = VARINT
    else:
        shape = FIXED[field.type]
        values = floats if shape in ("<f", "<d") else st.integers(0, 255)
        one = values.map(lambda value: struct.pack(shape, value))
        kind = FIXED32 if struct.calcsize(shape) == 4 else FIXED64
    single = one.map(lambda data: wire_field(number, kind, data))
    if not field.is_repeated:
        return single
    return single | st.lists(one, max_size=20).map(lambda parts: wire_field(number, BYTES, b"".join(parts)))


def mutated(make: Callable[[], Message]) -> st.SearchStrategy[Message]:
    """A valid message in which one to three things are changed, at any depth."""

    @st.composite
    def mutate(draw: Any) -> Message:
        message = make()
        for _ in range(draw(st.integers(1, 3))):
            places = list(_places(message))
            if not places:
                break
            holder, field = draw(st.sampled_from(places))
            _change(draw, holder, field)
        return message

    return mutate()


def swept(make: Callable[[], Message]) -> list[tuple[str, bytes]]:
    """Valid messages in each of which one field, or one element of a repeated field, has a value at a limit or is there
    twice. Each comes with a name made of field and value; several may have the same name.
    """
    found = []
    for number, (holder, field) in enumerate(_places(make())):
        if field.message_type is not None and field.is_repeated and getattr(holder, field.name) and not _is_map(field):
            message = make()
            elements = getattr(list(_places(message))[number][0], field.name)
            elements.append(elements[0])
            found.append((f"{field.full_name} twice", _serialized(message)))
        for value in _at_limits(holder, field):
            message = make()
            place, _ = list(_places(message))[number]
            if _is_map(field):
                getattr(place, field.name)[value[0]] = value[1]
            elif field.is_repeated:
                getattr(place, field.name)[-1:] = [value]
            else:
                setattr(place, field.name, value)
            found.append((f"{field.full_name}={value!r}", _serialized(message)))
    return found


def _at_limits(holder: Message, field: FieldDescriptor) -> list[Any]:
    value = getattr(holder, field.name)
    if _is_map(field):
        key, number = field.message_type.fields
        near = next(iter(value), 0)
        return [(each, 1.0) for each in dict.fromkeys(_within(key, limit) for limit in LIMITS)] + [
            (near, each) for each in _elements_at_limits(number)
        ]
    if field.message_type is not None or (field.is_repeated and not value):
        return []
    if field.type in UNSIGNED | SIGNED:
        near = [*value[:1]] if field.is_repeated else [value - 1, value + 1]
        return list(dict.fromkeys(_within(field, each) for each in [*LIMITS, *near]))
    if field.type == T.TYPE_BYTES:
        return [b"", value[:-1], value[:-4], value + value[:4], value[4:] + b"\xff" * 4, value[4:] + b"\0\4\0\0"]
    if field.type == T.TYPE_STRING:
        return TEXTS
    return _elements_at_limits(field)


def _elements_at_limits(field: FieldDescriptor) -> list[Any]:
    return [False, True] if field.type == T.TYPE_BOOL else FLOATS if field.type in FIXED else list(range(8))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _places(message: Message) -> Any:
    """Each field, set or not, of the message and of the messages inside it, with the message that holds it."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.message_type is None or _is_map(field):
            continue
        if field.is_repeated:
            for element in getattr(message, field.name):
                yield from _places(element)
        elif message.HasField(field.name):
            yield from _places(getattr(message, field.name))


def _change(draw: Any, holder: Message, field: FieldDescriptor) -> None:
    value = getattr(holder, field.name)
    if _is_map(field):
        key, number = field.message_type.fields
        value[draw(_values(key))] = draw(_values(number))
    elif field.message_type is not None:
        if field.is_repeated and value:
            action = draw(st.sampled_from(["double", "drop", "reverse", "clear"]))
            elements = list(value)
            changed = {"double": [*elements, elements[0]], "drop": elements[1:], "reverse": elements[::-1], "clear": []}
            copies = [type(element).FromString(element.SerializeToString()) for element in changed[action]]
            del value[:]
            value.extend(copies)
        elif not field.is_repeated and draw(st.booleans()):
            holder.ClearField(field.name)
        elif not field.is_repeated:
            value.SetInParent()
    elif field.is_repeated:
        action = draw(st.sampled_from(["double", "drop", "reverse", "append", "set"]))
        elements = list(value)
        if action in ("append", "set") or not elements:
            elements[-1 if action == "set" else len(elements) :] = [draw(_values(field))]
        elif action == "double":
            elements.append(elements[draw(st.integers(0, len(elements) - 1))])
        else:
            elements = elements[1:] if action == "drop" else elements[::-1]
        value[:] = elements
    elif field.type == T.TYPE_BYTES and value and draw(st.booleans()):
        cut = draw(st.integers(0, len(value)))
        setattr(
            holder,
            field.name,
            draw(st.sampled_from([value[:cut], value * 2, value + value[:4], value[4:], value[:-4]])),
        )
    elif field.type in UNSIGNED | SIGNED and draw(st.booleans()):
        near = value + draw(st.sampled_from([-16, -1, 1, 16]))
        setattr(holder, field.name, _within(field, near))
    elif draw(st.integers(0, 7)) == 0:
        holder.ClearField(field.name)
    else:
        setattr(holder, field.name, draw(_values(field)))


def _within(field: FieldDescriptor, value: int) -> int:
    if field.type in UNSIGNED:
        return value % 2 ** UNSIGNED[field.type]
    half = 2 ** (SIGNED[field.type] - 1)
    return (value + half) % (2 * half) - half


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type in UNSIGNED | SIGNED:
        return integers.map(lambda value: _within(field, value))
    if field.type == T.TYPE_ENUM:
        return st.integers(0, 7)
    if field.type == T.TYPE_BOOL:
        return st.booleans()
    if field.type == T.TYPE_STRING:
        return texts
    return blobs if field.type == T.TYPE_BYTES else floats


@st.composite
def spoilt(draw: Any, data: bytes) -> bytes:
    """A message's bytes, damaged."""
    action = draw(st.sampled_from(["cut", "flip", "insert", "append", "double", "fields"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    match action:
        case "cut":
            return data[:at]
        case "flip":
            return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :] if data else b"\xff"
        case "insert":
            return data[:at] + draw(st.binary(min_size=1, max_size=10)) + data[at:]
        case "append":
            return data + draw(st.binary(min_size=1, max_size=20))
        case "double":
            return data + data
        case _:
            return data + b"".join(draw(st.lists(any_field, min_size=1, max_size=4)))


def huge(descriptor: Descriptor) -> st.SearchStrategy[bytes]:
    """One field, repeated until the message has one of the sizes in HUGE_BYTES."""

    def repeat(field: bytes, size: int) -> bytes:
        return field * (size // len(field))

    return st.builds(repeat, fields_of(descriptor, MAX_DEPTH - 1) | any_field, st.sampled_from(HUGE_BYTES))


def hostile(make: Callable[[], Message]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Pairs of kind and bytes. make: returns a valid message, from which most are made."""
    descriptor = make().DESCRIPTOR
    right = mutated(make).map(_serialized)
    kinds: dict[str, tuple[int, st.SearchStrategy[bytes]]] = {
        "right": (4, st.builds(make).map(_serialized)),
        "changed": (40, right),
        "well-formed": (12, well_formed(descriptor)),
        "spoilt": (20, st.builds(make).map(_serialized).flatmap(spoilt) | right.flatmap(spoilt)),
        "any fields": (4, st.lists(any_field, max_size=6).map(b"".join)),
        "raw": (6, st.binary(max_size=200)),
        "empty": (1, st.just(b"")),
        "huge": (1, huge(descriptor)),
    }
    names = [name for name, (weight, _) in kinds.items() for _ in range(weight)]
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), kinds[name][1]))


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()
