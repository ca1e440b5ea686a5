"""Requests that would take long to decode are refused undecoded.

Decoding a request holds the event loop. A text may be as large as a message, as it is only copied. But four million ids
or two million empty stop strings are no larger, and take much longer. So what is not the text of a prompt or a grammar
is measured first: by the lengths that stand before a message's fields, without a look into them. A conversation has
many texts, so its fields are counted too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tandem.v1 import inference_pb2
from tandem_shared.errors import FieldViolation, InvalidRequest
from tandem_shared.rpc.wire_fields import TooManyFields, fields, tags

MAX_OTHER_BYTES = 800 * 1024
"""The limit of all fields together but the prompt and the text of a grammar. The longest choices of a structured output
take 530 kB, bad words 130 kB, allowed tokens 80 kB, stop strings 30 kB, biases 15 kB, all else a few bytes. So many
bytes are decoded in milliseconds, even if each pair of them is a field.
"""

MAX_PLAIN_OTHER_BYTES = 256 * 1024
"""The limit of all fields of Tokenize and Detokenize but the text or the ids."""

MAX_ID_BYTES = 5
"""The most bytes of one id in a packed field."""

MAX_FIELDS = 256
"""The most fields on the wire of a request, a prompt or a structured output. They have up to ten, but a field may come
in parts.
"""

MAX_CHAT_FIELDS = 16_384
"""The most fields on the wire of a conversation, if the request is not small: a usual message has three, and a call of
a tool with its answer eleven. More would take too long to count.
"""

Texts = dict[int, "Texts | None"]
"""The fields of a message that are texts of any length, or messages with such fields, by tag."""

PROMPT_TAG, FORM_TAG = tags(inference_pb2.GenerateRequest, "prompt", "structured_output")
GRAMMAR_TAGS = tags(inference_pb2.StructuredOutput, "json_schema", "regex", "lark")
TEXT_TAG, CHAT_TAG = tags(inference_pb2.Prompt, "text", "chat")
TOOLS_TAG, KWARGS_TAG, MESSAGES_TAG = tags(inference_pb2.Chat, "tools", "chat_template_kwargs", "messages")
CONTENT_TAG, REASONING_TAG, CALLS_TAG = tags(inference_pb2.ChatMessage, "content", "reasoning_content", "tool_calls")
(ARGUMENTS_TAG,) = tags(inference_pb2.ToolCall, "arguments")
CHAT_TEXTS: Texts = {
    TOOLS_TAG: None,
    KWARGS_TAG: None,
    MESSAGES_TAG: {CONTENT_TAG: None, REASONING_TAG: None, CALLS_TAG: {ARGUMENTS_TAG: None}},
}
TOKENIZE_CHAT_TAG, TOKENIZE_TEXT_TAG = tags(inference_pb2.TokenizeRequest, "chat", "text")
(DETOKENIZE_IDS_TAG,) = tags(inference_pb2.DetokenizeRequest, "token_ids")

T = TypeVar("T")


@dataclass(frozen=True)
class TooLargeToDecode:
    """Stands for a request that was not decoded: an error that is raised while decoding would end as INTERNAL."""

    violation: FieldViolation

    @property
    def error(self) -> InvalidRequest:
        return InvalidRequest(self.violation)


def bounded(
    decode: Callable[[bytes], T], violation_of: Callable[[bytes], FieldViolation | None], small_bytes: int
) -> Callable[[bytes], T | TooLargeToDecode]:
    """A decoder that measures a message first, unless it is small as a whole: small_bytes at most."""

    def decode_bounded(data: bytes) -> T | TooLargeToDecode:
        violation = violation_of(data) if len(data) > small_bytes else None
        return decode(data) if violation is None else TooLargeToDecode(violation)

    return decode_bounded


def bounded_generate(
    decode: Callable[[bytes], T], max_num_ids: Callable[[], int]
) -> Callable[[bytes], T | TooLargeToDecode]:
    """A decoder of either generate request that measures it first. max_num_ids gives how many ids a prompt may have."""
    return bounded(decode, lambda data: _violation(data, max_num_ids()), MAX_OTHER_BYTES)


def bounded_detokenize(
    decode: Callable[[bytes], T], max_num_ids: Callable[[], int]
) -> Callable[[bytes], T | TooLargeToDecode]:
    """A decoder of a request of ids and little else. The ids come packed, as protobuf clients send them."""
    return bounded(decode, lambda data: _violation_of_detokenize(data, max_num_ids()), MAX_PLAIN_OTHER_BYTES)


def bounded_tokenize(decode: Callable[[bytes], T]) -> Callable[[bytes], T | TooLargeToDecode]:
    """A decoder of a request of one text or conversation and little else."""
    return bounded(decode, _violation_of_tokenize, MAX_PLAIN_OTHER_BYTES)


def _violation(data: bytes, max_num_ids: int) -> FieldViolation | None:
    num_other = num_id_bytes = 0
    chat = _ChatMeasure()
    try:
        for tag, start, end in fields(data, 0, len(data), MAX_FIELDS):
            if tag == PROMPT_TAG:
                num_id_bytes += num_bytes_beside((TEXT_TAG, CHAT_TAG), data, start, end)
                chat.add_all(CHAT_TAG, data, start, end)
            elif tag == FORM_TAG:
                num_other += num_bytes_beside(GRAMMAR_TAGS, data, start, end)
            else:
                num_other += end - start
    except TooManyFields:
        num_other = len(data)
    if chat.has_too_many_fields:
        return _too_many_chat_fields("prompt.chat")
    return violation_of_sizes(num_other + chat.num_other_bytes, num_id_bytes, "prompt.token_ids", max_num_ids)


def violation_of_sizes(num_other: int, num_id_bytes: int, ids_field: str, max_num_ids: int) -> FieldViolation | None:
    """What is wrong with a generate request of so many bytes beside the prompt and the grammar, and so many of ids."""
    if num_other > MAX_OTHER_BYTES:
        return _too_many_bytes_beside(MAX_OTHER_BYTES, "prompt and the grammar")
    has_too_many = num_id_bytes > MAX_OTHER_BYTES + max_num_ids * MAX_ID_BYTES
    return _too_many_ids(ids_field, max_num_ids) if has_too_many else None


def _violation_of_tokenize(data: bytes) -> FieldViolation | None:
    chat = _ChatMeasure()
    try:
        num_other = num_bytes_beside((TOKENIZE_TEXT_TAG, TOKENIZE_CHAT_TAG), data, 0, len(data))
        chat.add_all(TOKENIZE_CHAT_TAG, data, 0, len(data))
    except TooManyFields:
        num_other = len(data)
    if chat.has_too_many_fields:
        return _too_many_chat_fields("chat")
    is_right = num_other + chat.num_other_bytes <= MAX_PLAIN_OTHER_BYTES
    return None if is_right else _too_many_bytes_beside(MAX_PLAIN_OTHER_BYTES, "text")


def _violation_of_detokenize(data: bytes, max_num_ids: int) -> FieldViolation | None:
    if len(data) > MAX_PLAIN_OTHER_BYTES + max_num_ids * MAX_ID_BYTES:
        return _too_many_ids("token_ids", max_num_ids)
    try:
        num_other = num_bytes_beside((DETOKENIZE_IDS_TAG,), data, 0, len(data))
    except TooManyFields:
        num_other = len(data)
    return _too_many_bytes_beside(MAX_PLAIN_OTHER_BYTES, "ids") if num_other > MAX_PLAIN_OTHER_BYTES else None


class _ChatMeasure:
    """Counts the fields of a request's conversation, which may come in parts, and the bytes that are in no text."""

    def __init__(self) -> None:
        self._num_fields = 0
        self.num_other_bytes = 0

    @property
    def has_too_many_fields(self) -> bool:
        return self._num_fields > MAX_CHAT_FIELDS

    def add_all(self, chat_tag: int, data: bytes, start: int, end: int) -> None:
        """Measures the conversations among the fields in data[start:end]. Raises TooManyFields and DecodeError."""
        for tag, at, stop in fields(data, start, end, MAX_FIELDS):
            if tag == chat_tag:
                self._add(CHAT_TEXTS, data, at, stop)

    def _add(self, texts: Texts, data: bytes, start: int, end: int) -> None:
        for tag, at, stop in fields(data, start, end, MAX_CHAT_FIELDS):
            self._num_fields += 1
            if self.has_too_many_fields:
                raise TooManyFields
            inner = texts.get(tag)
            if inner is not None:
                self._add(inner, data, at, stop)
            elif tag not in texts:
                self.num_other_bytes += stop - at


def num_bytes_beside(tags: tuple[int, ...], data: bytes, start: int, end: int, max_fields: int = MAX_FIELDS) -> int:
    """The size of the fields in data[start:end] that have other tags. Raises TooManyFields and DecodeError."""
    return sum(stop - at for tag, at, stop in fields(data, start, end, max_fields) if tag not in tags)


def _too_many_chat_fields(field: str) -> FieldViolation:
    return FieldViolation(field, f"has more than {MAX_CHAT_FIELDS} messages, tools and their fields, all together")


def _too_many_bytes_beside(limit: int, name: str) -> FieldViolation:
    return FieldViolation("", f"has more than {limit} bytes beside the {name}")


def _too_many_ids(field: str, max_num_ids: int) -> FieldViolation:
    return FieldViolation(field, f"has more bytes than {max_num_ids} ids")
