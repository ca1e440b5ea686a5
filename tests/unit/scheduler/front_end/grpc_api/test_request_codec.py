"""No field of a request is dropped silently: each changes the plain parameters that are made of it."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from tandem.v1 import inference_pb2
from tandem_scheduler.front_end.generation_params import StructuredOutput
from tandem_scheduler.front_end.grpc_api.request_codec import chat_of, params_of


def leaves(message: Descriptor, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all fields of a message that are not messages with fields of their own. Maps are leaves."""
    for field in message.fields:
        here = (*path, field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated:
            yield from leaves(field.message_type, here)
        else:
            yield here


def set_leaf(request: Message, path: tuple[str, ...]) -> None:
    """Gives the field a value that is no default."""
    *parts, name = path
    holder: Any = request
    for part in parts:
        holder = getattr(holder, part)
    field = holder.DESCRIPTOR.fields_by_name[name]
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            getattr(holder, name)[3] = 1.5
        else:
            getattr(holder, name).add()
        return
    value: Any = "x" if field.type == FieldDescriptor.TYPE_STRING else 3
    if field.type == FieldDescriptor.TYPE_BOOL:
        value = name != "skip_special_tokens"
    if field.is_repeated:
        getattr(holder, name).append(value)
    else:
        setattr(holder, name, value)


@pytest.mark.parametrize("message", [inference_pb2.GenerateRequest, inference_pb2.GenerateStreamRequest])
def test_each_field_changes_the_params(message: type[Message]) -> None:
    paths = list(leaves(message.DESCRIPTOR))
    assert len(paths) > 30
    nothing = params_of(message(), None)
    for path in paths:
        request = message()
        set_leaf(request, path)
        params = params_of(request, None)
        # An empty repeated field equals no tuple, so representations are compared.
        assert repr(params) != repr(nothing), path


def plain(value: Any) -> Any:
    """What is in a part of the params, to be compared."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return [plain(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


@pytest.mark.parametrize("part", ["Chat", "ChatMessage", "ToolCall"])
def test_each_field_changes_the_chat(part: str) -> None:
    def chat_with(path: tuple[str, ...] | None) -> Any:
        chat = inference_pb2.Chat()
        message = chat.messages.add()
        holder = {"Chat": chat, "ChatMessage": message, "ToolCall": message.tool_calls.add()}[part]
        if path is not None:
            set_leaf(holder, path)
        return plain(chat_of(chat))

    for path in leaves(getattr(inference_pb2, part).DESCRIPTOR):
        assert chat_with(path) != chat_with(None), path


def test_a_form_has_its_parts() -> None:
    request = inference_pb2.GenerateRequest()
    assert params_of(request, None).structured_output is None
    request.structured_output.start_after_token_id = 0
    assert params_of(request, None).structured_output == StructuredOutput(start_after_token_id=0)
    request.structured_output.choice.texts.append("yes")
    form = params_of(request, None).structured_output
    assert form is not None and form.choice is not None and list(form.choice) == ["yes"] and form.regex is None
