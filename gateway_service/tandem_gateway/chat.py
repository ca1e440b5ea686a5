"""/v1/chat/completions."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from tandem.outputs import FINISH_REASONS
from tandem.v1 import inference_pb2
from tandem_gateway.chat_plan import ChatPlan, OutputReader, plan_chat
from tandem_gateway.connection import (
    EventStream,
    events_or_error,
    metadata_of,
    request_id_of,
    while_connected,
    with_first,
)
from tandem_gateway.conversation import new_call_id
from tandem_gateway.engine import Engine
from tandem_gateway.events import TextEvents, event
from tandem_gateway.generation import form_name, stop_reason_of, usage_of
from tandem_gateway.logprobs import chat_logprobs, prompt_logprobs
from tandem_gateway.output_parser import CallStart, Content, Piece, Reasoning
from tandem_gateway.problems import name_params, refuse
from tandem_gateway.protocol import ChatBody


@dataclass
class Chats:
    """One request: what its answers have in common."""

    body: ChatBody
    request_id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, kind: str, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        common = {"id": f"chatcmpl-{self.request_id}", "object": kind, "created": self.created}
        return {**common, "model": self.model, "choices": choices, **fields}

    def ends(self, finish: inference_pb2.Finish, reader: OutputReader) -> dict[str, Any]:
        reason = FINISH_REASONS.get(finish.reason)
        if reason == "stop" and reader.calls:
            reason = "tool_calls"
        return {"finish_reason": reason, "stop_reason": stop_reason_of(finish, self.body)}


async def create(engine: Engine, request: Request, body: ChatBody) -> Any:
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    name_params(request, response_format=form_name(body), logprobs="top_logprobs", max_tokens=limit)
    metadata = metadata_of(request)
    request_id = body.request_id or request_id_of(request)
    if body.reasoning_effort == "none" and body.enable_thinking is None:
        body.enable_thinking = False
    work = plan_chat(
        engine,
        metadata,
        body,
        body.messages,
        request_id,
        max_tokens=getattr(body, limit),
        logprobs=_num_logprobs(body),
    )
    plan = await while_connected(request, work)
    if body.stream:
        model = body.model or await engine.model_name(metadata)
        stream = engine.stream([plan.fields], metadata)
        items = await with_first(stream, request, stream.cancel)
        return EventStream(events_or_error(_events(Chats(body, request_id, model), plan, items)), stream.cancel)
    response = await while_connected(request, engine.generate(plan.fields, metadata))
    return _whole(Chats(body, request_id, response.model), plan, response)


def _num_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise refuse("top_logprobs", "needs logprobs to be true")
    return (body.top_logprobs or 0) if body.logprobs else None


def _whole(chats: Chats, plan: ChatPlan, response: inference_pb2.GenerateResponse) -> dict[str, Any]:
    choices = []
    for each in response.choices:
        reader = plan.reader()
        reader.read(each.text, is_last=True)
        message: dict[str, Any] = {"role": "assistant", "content": reader.content}
        if reader.reasoning:
            message["reasoning_content"] = reader.reasoning
        if reader.calls:
            message["tool_calls"] = [
                {"id": new_call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in reader.calls
            ]
        if not reader.content and (reader.reasoning or reader.calls):
            message["content"] = None
        choice = {"index": each.choice_index, "message": message, "logprobs": None, **chats.ends(each.finish, reader)}
        if chats.body.logprobs:
            choice["logprobs"] = chat_logprobs(each.logprobs)
        choices.append(choice)
    answer = chats.answer("chat.completion", choices, usage=usage_of([response.usage]))
    if chats.body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(response.prompt_logprobs)
    return answer


async def _events(
    chats: Chats, plan: ChatPlan, items: "AsyncIterator[tuple[int, inference_pb2.GenerateStreamResponse]]"
) -> AsyncIterator[bytes]:
    readers: dict[int, OutputReader] = {}
    usages: list[inference_pb2.Usage] = []
    common: dict[str, Any] = {"usage": None} if chats.body.includes_usage() else {}
    has_prompt = False

    def chunk(index: int, delta: dict[str, Any], **fields: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
        return event(chats.answer("chat.completion.chunk", [choice], **common))

    texts: dict[tuple[int, type[Piece]], TextEvents] = {}

    def delta_event(index: int, piece: Piece) -> bytes:
        if not isinstance(piece, Content | Reasoning):
            return chunk(index, _delta(piece))
        kind = type(piece)
        if (index, kind) not in texts:
            texts[index, kind] = TextEvents(lambda text: chunk(index, _delta(kind(text))))
        return texts[index, kind].of(piece.text)

    async for _, message in items:
        index = message.choice_index
        if message.prompt_logprobs:
            entries = prompt_logprobs(message.prompt_logprobs, is_start=not has_prompt)
            has_prompt = True
            yield event(chats.answer("chat.completion.chunk", [], prompt_logprobs=entries, **common))
        if index not in readers:
            readers[index] = plan.reader()
            yield chunk(index, {"role": "assistant", "content": ""})
        reader = readers[index]
        is_last = message.HasField("finish")
        pieces = reader.read(message.text_delta, is_last=is_last)
        if message.logprobs and chats.body.logprobs:
            first = _delta(pieces.pop(0)) if pieces else {}
            yield chunk(index, first, logprobs=chat_logprobs(message.logprobs))
        for piece in pieces:
            yield delta_event(index, piece)
        if is_last:
            yield chunk(index, {}, **chats.ends(message.finish, reader))
        if message.HasField("usage"):
            usages.append(message.usage)
    if chats.body.includes_usage():
        yield event(chats.answer("chat.completion.chunk", [], usage=usage_of(usages)))


def _delta(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, Content):
        return {"content": piece.text}
    if isinstance(piece, Reasoning):
        return {"reasoning_content": piece.text}
    if isinstance(piece, CallStart):
        function = {"name": piece.name, "arguments": ""}
        call = {"index": piece.index, "id": new_call_id(), "type": "function", "function": function}
        return {"tool_calls": [call]}
    return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
