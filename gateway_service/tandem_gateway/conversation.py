"""Conversations as the gRPC API has them, made from HTTP's messages and tools."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from tandem.v1 import inference_pb2
from tandem_gateway.problems import refuse
from tandem_gateway.protocol import ChatOptions, Message, Tool, ToolCall


def chat_of(messages: Sequence[Message], tools: Sequence[Tool], options: ChatOptions) -> inference_pb2.Chat:
    """tools: those that the model is to see. Raises InvalidRequest for what can't be a conversation."""
    kwargs = dict(options.chat_template_kwargs or {})
    for name in ("add_generation_prompt", "continue_final_message"):
        # vLLM takes these as fields of the body; transformers takes them beside the template's variables.
        if getattr(options, name) is not None:
            kwargs[name] = getattr(options, name)
    thinking = _enable_thinking(options)
    kwargs.pop("enable_thinking", None)
    try:
        return inference_pb2.Chat(
            messages=[_message(each) for each in messages],
            tools=[json.dumps(tool.given(), ensure_ascii=False, allow_nan=False) for tool in tools],
            add_generation_prompt=kwargs.pop("add_generation_prompt", None),
            continue_final_message=kwargs.pop("continue_final_message", None),
            enable_thinking=thinking,
            chat_template_kwargs=json.dumps(kwargs, ensure_ascii=False, allow_nan=False) if kwargs else None,
        )
    except (TypeError, ValueError) as error:
        raise refuse("messages", f"are no conversation: {error}") from error


def _enable_thinking(options: ChatOptions) -> bool | None:
    """Whether the model is to think, as a field of the body or of chat_template_kwargs. None is the template's default.
    Raises InvalidRequest.
    """
    given = options.enable_thinking
    if given is None:
        given = (options.chat_template_kwargs or {}).get("enable_thinking")
    if given is not None and not isinstance(given, bool):
        raise refuse("chat_template_kwargs.enable_thinking", "must be true or false")
    return given


def new_call_id() -> str:
    """An id that no other call of any conversation has."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _message(message: Message) -> inference_pb2.ChatMessage:
    return inference_pb2.ChatMessage(
        # Templates know no developers, who are what system was before, and some leave out roles that they don't know.
        role="system" if message.role == "developer" else message.role,
        content=_text(message),
        reasoning_content=message.reasoning_content if message.reasoning_content is not None else message.reasoning,
        tool_calls=[_tool_call(call) for call in message.tool_calls or ()],
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _text(message: Message) -> str | None:
    """A content of several parts is joined by line breaks, as in vLLM."""
    if message.content is None or isinstance(message.content, str):
        return message.content
    return "\n".join(part.refusal if part.type == "refusal" else part.text for part in message.content)


def _tool_call(call: ToolCall) -> inference_pb2.ToolCall:
    arguments: Any = call.function.arguments
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return inference_pb2.ToolCall(id=call.id, name=call.function.name, arguments=arguments or "")
