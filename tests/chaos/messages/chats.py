"""Conversations to make hostile ones from, and what the proto's comments say of them."""

import json

from tandem.v1 import inference_pb2
from tests.e2e.services import generate_request

OWN_FIELDS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")


def chat_request() -> inference_pb2.GenerateStreamRequest:
    """A valid request with a conversation that has all that one can have."""
    request = generate_request([], 4, temperature=0.8, seed=3)
    call = inference_pb2.ToolCall(id="call_1", name="clock", arguments='{"zone": "UTC"}')
    messages = [
        inference_pb2.ChatMessage(role="system", content="You are ROMEO."),
        inference_pb2.ChatMessage(role="user", content="What hour is it?", name="Juliet"),
        inference_pb2.ChatMessage(role="assistant", reasoning_content="Look.", tool_calls=[call]),
        inference_pb2.ChatMessage(role="tool", content="nine", tool_call_id="call_1"),
    ]
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    chat = inference_pb2.Chat(
        messages=messages,
        tools=[json.dumps(tool)],
        add_generation_prompt=True,
        enable_thinking=False,
        chat_template_kwargs='{"a": [1]}',
        continue_final_message=False,
    )
    request.prompt.CopyFrom(inference_pb2.Prompt(chat=chat))
    return request


def may_be_right(chat: inference_pb2.Chat) -> bool:
    """Whether nothing in the conversation breaks a rule that the proto states. The template may still refuse it, and
    its text may be too long.
    """
    calls = [call for message in chat.messages for call in message.tool_calls]
    kwargs = _object_of(chat.chat_template_kwargs or "{}")
    return (
        1 <= len(chat.messages) <= 4096
        and len(chat.tools) <= 1024
        and len(calls) <= 1024
        and all(message.role for message in chat.messages)
        and all(call.name and _object_of(call.arguments or "{}") is not None for call in calls)
        and all(_object_of(tool) is not None for tool in chat.tools)
        and kwargs is not None
        and not set(OWN_FIELDS) & set(kwargs)
        and not (chat.add_generation_prompt and chat.continue_final_message)
    )


def _object_of(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
