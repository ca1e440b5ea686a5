"""Chat: a conversation in OpenAI's form becomes the API's message; what does not is refused by its place."""

import json
import math
from typing import Any

import pytest

from tandem.chat import Chat
from tandem.v1 import inference_pb2
from tandem_shared.errors import InvalidRequest
from tests.support.chats import CONVERSATIONS, USER, Message, weather_call
from tests.support.chats import chat_of as plain_chat_of

FIELDS = ("tools", "add_generation_prompt", "enable_thinking", "continue_final_message")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_message_says_what_the_conversation_says(name: str) -> None:
    messages, options = CONVERSATIONS[name]
    own = {name: value for name, value in options.items() if name in FIELDS}
    kwargs = {name: value for name, value in options.items() if name not in FIELDS}
    message = Chat(messages, chat_template_kwargs=kwargs or None, **own).message
    expected = plain_chat_of(messages, **options)
    assert [each.role for each in message.messages] == [each.role for each in expected.messages]
    for told, true in zip(message.messages, expected.messages, strict=True):
        for field in ("content", "reasoning_content", "tool_call_id", "name"):
            value = getattr(told, field) if told.HasField(field) else None
            assert value == getattr(true, field)
        assert [(call.id, call.name, json.loads(call.arguments)) for call in told.tool_calls] == [
            (call.id, call.name, json.loads(call.arguments)) for call in true.tool_calls
        ]
    assert [json.loads(each) for each in message.tools] == options.get("tools", [])
    for field in FIELDS[1:]:
        assert (getattr(message, field) if message.HasField(field) else None) == options.get(field)
    assert (json.loads(message.chat_template_kwargs) if kwargs else {}) == kwargs


def test_what_openais_client_returns_can_be_sent_again() -> None:
    """It has keys with None, and the arguments of calls as text."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}, "index": 0}
    answer = {"role": "assistant", "content": None, "refusal": None, "audio": None, "tool_calls": [call]}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Chat([answer, {"role": "user", "content": parts}]).message == inference_pb2.Chat(
        messages=[
            {"role": "assistant", "tool_calls": [{"id": "c", "name": "f", "arguments": '{"a": 1}'}]},
            {"role": "user", "content": "a\nb"},
        ]
    )


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ("hello", ""),
        ({}, ".role"),
        ({"role": 5}, ".role"),
        ({"role": "user", "content": 5}, ".content"),
        ({"role": "user", "content": [{"type": "image_url", "text": "x"}]}, ".content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ".content[0]"),
        ({"role": "user", "name": ["x"]}, ".name"),
        ({"role": "user", "content": "\ud800"}, ""),
        ({"role": "user", "weight": 1}, ""),
        ({"role": "assistant", "tool_calls": ["f"]}, ".tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, ".tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, ".tool_calls[0].function.name"),
        ({"role": "assistant", "tool_calls": [weather_call(x=math.nan)]}, ".tool_calls[0].function.arguments"),
    ],
    ids=str,
)
def test_a_wrong_message_is_refused_by_its_place(message: Message, path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Chat([USER, message])
    assert [violation.field for violation in caught.value.violations] == [f"messages[1]{path}"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": USER}, "messages"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"a": {1}}]}, "tools[0]"),
        ({"chat_template_kwargs": "{}"}, "chat_template_kwargs"),
        ({"enable_thinking": 1}, "enable_thinking"),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused_by_its_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Chat(**{"messages": [USER], **fields})
    assert [violation.field for violation in caught.value.violations] == [field]
