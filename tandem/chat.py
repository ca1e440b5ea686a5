"""A conversation as a prompt, of messages as OpenAI's API and transformers have them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem.v1 import inference_pb2
from tandem_shared.errors import FieldViolation, InvalidRequest

TEXTS = ("content", "reasoning_content", "tool_call_id", "name")
KNOWN = ("role", *TEXTS, "tool_calls")


@dataclass(frozen=True)
class Chat:
    """A conversation, of which the model's chat template makes the prompt. protos/tandem/v1/inference.proto says what
    the fields mean, and which ones the server refuses.

    A message is a dict with "role" and "content", and perhaps "reasoning_content", "tool_calls", "tool_call_id" or
    "name". The content is a text, or a list of parts like {"type": "text", "text": "..."}, which are joined as lines.
    A key whose value is None counts as absent. Raises InvalidRequest, which names the message, when the object is made.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    """The tools that the model may call, as OpenAI has them."""
    add_generation_prompt: bool | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    continue_final_message: bool | None = None
    message: inference_pb2.Chat = field(init=False, repr=False, compare=False)
    """The same as the API has it."""

    def __post_init__(self) -> None:
        if isinstance(self.messages, str | Mapping):
            raise _refusal("messages", f"must be a list of dicts, is of type {type(self.messages).__name__}")
        kwargs = self.chat_template_kwargs
        message = inference_pb2.Chat(
            messages=[_message(each, f"messages[{index}]") for index, each in enumerate(self.messages)],
            tools=[_json(each, f"tools[{index}]") for index, each in enumerate(self.tools or ())],
            chat_template_kwargs=None if kwargs is None else _json(kwargs, "chat_template_kwargs"),
        )
        for name in ("add_generation_prompt", "enable_thinking", "continue_final_message"):
            if (value := getattr(self, name)) is not None:
                if not isinstance(value, bool):
                    raise _refusal(name, f"must be True, False or None, is {value!r:.100}")
                setattr(message, name, value)
        # The class is frozen, but this is still its own construction.
        object.__setattr__(self, "message", message)


def _message(message: Any, path: str) -> inference_pb2.ChatMessage:
    given = _fields(message, path, KNOWN)
    if not isinstance(given.get("role"), str):
        raise _refusal(f"{path}.role", f"must be a text, is {given.get('role')!r:.100}")
    texts = {name: _text(given[name], f"{path}.{name}") for name in TEXTS if name in given}
    calls = given.get("tool_calls", ())
    try:
        return inference_pb2.ChatMessage(
            role=given["role"],
            tool_calls=[_tool_call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(calls)],
            **texts,
        )
    except UnicodeEncodeError as error:
        raise _refusal(path, "has characters that are not Unicode text") from error


def _tool_call(call: Any, path: str) -> inference_pb2.ToolCall:
    # "index" is in the pieces of which a stream of OpenAI's API makes a call.
    given = _fields(call, path, ("id", "type", "function", "index"))
    function = _fields(given.get("function"), f"{path}.function", ("name", "arguments"))
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = _json(arguments, f"{path}.function.arguments")
    name = _text(function.get("name"), f"{path}.function.name")
    return inference_pb2.ToolCall(id=_text(given.get("id", ""), f"{path}.id"), name=name, arguments=arguments)


def _fields(value: Any, path: str, known: Sequence[str]) -> dict[str, Any]:
    """The values of a dict that are not None. Raises InvalidRequest for one of an unknown key."""
    if not isinstance(value, Mapping):
        raise _refusal(path, f"must be a dict, is of type {type(value).__name__}")
    given = {name: each for name, each in value.items() if each is not None}
    if unknown := [str(name) for name in given if name not in known]:
        raise _refusal(path, f"has unknown keys: {', '.join(unknown)}; known are {', '.join(known)}")
    return given


def _text(value: Any, path: str) -> str:
    """A text, or the lines of a list of text parts."""
    if isinstance(value, str):
        return value
    if path.endswith(".content") and isinstance(value, list | tuple):
        parts = [_fields(part, f"{path}[{index}]", ("type", "text")) for index, part in enumerate(value)]
        if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            return "\n".join(part["text"] for part in parts)
    raise _refusal(path, f"must be a text, is {value!r:.100}")


def _json(value: Any, path: str) -> str:
    if not isinstance(value, Mapping):
        raise _refusal(path, f"must be a dict, is of type {type(value).__name__}")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal(path, f"is no JSON: {error}") from error
    return text


def _refusal(path: str, description: str) -> InvalidRequest:
    return InvalidRequest(FieldViolation(path, description))
