"""Turns generate requests of the gRPC API into GenerationParams. Checks nothing and copies no repeated field."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, overload

import grpc

from tandem.v1 import inference_pb2
from tandem_scheduler.engine_interface import TraceContext
from tandem_scheduler.front_end.generation_params import (
    Chat,
    ChatMessage,
    GenerationParams,
    StructuredOutput,
    ToolCall,
)
from tandem_shared.errors import FieldViolation, InvalidRequest
from tandem_shared.rpc.call_metadata import MAX_REPLY_BYTES_KEY
from tandem_shared.sampling_fields import REQUEST_FIELDS
from tandem_shared.tracing import TRACE_HEADERS, is_trace_header

DEFAULT_REPLY_BYTES = 4 * 1024 * 1024
"""gRPC's own default limit on the messages that a client accepts."""

MAX_REPLY_BYTES = 8 * 1024 * 1024
"""The largest reply, whatever the client accepts: a reply is in memory several times before it leaves, so larger
outputs have to be streamed."""

MAX_LIMIT_DIGITS = 12

SAMPLING_NAMES = tuple(field.name for field in REQUEST_FIELDS)

AnyGenerateRequest = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest

T = TypeVar("T")


def params_of(
    request: AnyGenerateRequest, max_reply_bytes: int | None, deadline: float | None = None
) -> GenerationParams:
    """max_reply_bytes is None if the output is streamed. deadline is the call's, in seconds of time.monotonic()."""
    prompt, sampling, stopping, output = request.prompt, request.sampling, request.stopping, request.output
    return GenerationParams(
        prompt_text=prompt.text if prompt.HasField("text") else None,
        prompt_token_ids=prompt.token_ids.ids if prompt.HasField("token_ids") else None,
        prompt_chat=chat_of(prompt.chat) if prompt.HasField("chat") else None,
        request_id=request.request_id,
        model=request.model,
        sampling={name: getattr(sampling, name) for name in SAMPLING_NAMES if sampling.HasField(name)},  # type: ignore[arg-type]
        logit_bias=sampling.logit_bias,
        bad_words=sampling.bad_words,
        allowed_token_ids=sampling.allowed_token_ids,
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        min_tokens=stopping.min_tokens,
        stop_strings=stopping.stop_strings,
        include_stop_string=stopping.include_stop_string,
        stop_token_ids=stopping.stop_token_ids,
        ignore_eos=stopping.ignore_eos,
        skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
        num_logprobs=output.num_logprobs if output.HasField("num_logprobs") else None,
        num_prompt_logprobs=output.num_prompt_logprobs if output.HasField("num_prompt_logprobs") else None,
        logprob_token_ids=output.logprob_token_ids,
        structured_output=_form_of(request.structured_output) if request.HasField("structured_output") else None,
        num_choices=request.num_choices if request.HasField("num_choices") else 1,
        priority=request.priority if request.HasField("priority") else None,
        cache_salt=request.cache_salt,
        max_reply_bytes=max_reply_bytes,
        deadline=deadline,
    )


def chat_of(chat: inference_pb2.Chat) -> Chat:
    return Chat(
        messages=_Converted(chat.messages, _message_of),
        tools=chat.tools,
        add_generation_prompt=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else None,
        enable_thinking=chat.enable_thinking if chat.HasField("enable_thinking") else None,
        template_kwargs=chat.chat_template_kwargs if chat.HasField("chat_template_kwargs") else None,
        continue_final_message=chat.continue_final_message,
    )


class _Converted(Sequence[T]):
    """The elements of a repeated field, each converted when it is read."""

    def __init__(self, values: Sequence[Any], convert: Callable[[Any], T]) -> None:
        self._values = values
        self._convert = convert

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return _Converted(self._values[index], self._convert)
        return self._convert(self._values[index])


def _message_of(message: inference_pb2.ChatMessage) -> ChatMessage:
    return ChatMessage(
        role=message.role,
        content=message.content if message.HasField("content") else None,
        reasoning_content=message.reasoning_content if message.HasField("reasoning_content") else None,
        tool_calls=_Converted(message.tool_calls, lambda call: ToolCall(call.id, call.name, call.arguments)),
        tool_call_id=message.tool_call_id if message.HasField("tool_call_id") else None,
        name=message.name if message.HasField("name") else None,
    )


def _form_of(form: inference_pb2.StructuredOutput) -> StructuredOutput:
    return StructuredOutput(
        json_schema=form.json_schema if form.HasField("json_schema") else None,
        json_object=form.json_object,
        regex=form.regex if form.HasField("regex") else None,
        choice=form.choice.texts if form.HasField("choice") else None,
        lark=form.lark if form.HasField("lark") else None,
        start_after_token_id=form.start_after_token_id if form.HasField("start_after_token_id") else None,
    )


def reply_limit(metadata: Iterable[tuple[str, str | bytes]] | None) -> int:
    """The largest reply, in bytes, that the client accepts according to the call's metadata. Raises InvalidRequest."""
    for key, value in metadata or ():
        if key == MAX_REPLY_BYTES_KEY:
            is_number = isinstance(value, str) and value.isascii() and value.isdigit()
            if not is_number or len(value) > MAX_LIMIT_DIGITS:
                raise InvalidRequest(FieldViolation(MAX_REPLY_BYTES_KEY, "must be a number of bytes"))
            return min(int(value), MAX_REPLY_BYTES)
    return DEFAULT_REPLY_BYTES


def deadline_of(context: "grpc.aio.ServicerContext[Any, Any]") -> float | None:
    """When the call's deadline passes, in seconds of time.monotonic(); None if it has no deadline."""
    left_s = context.time_remaining()
    return None if left_s is None else time.monotonic() + left_s


def trace_of(context: "grpc.aio.ServicerContext[Any, Any]", rpc: str) -> TraceContext:
    """The trace of a call of the RPC, which is service and method."""
    headers = {
        name: value
        for name, value in context.invocation_metadata() or ()
        if name in TRACE_HEADERS and isinstance(value, str) and is_trace_header(value)
    }
    return TraceContext(rpc, **headers)
