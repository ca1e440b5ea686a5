"""/v1/responses: OpenAI's newer form of chats, without anything stored."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from tandem.v1 import inference_pb2
from tandem_gateway.chat_plan import ChatPlan, plan_chat
from tandem_gateway.connection import EventStream, metadata_of, request_id_of, while_connected, with_first
from tandem_gateway.engine import Engine
from tandem_gateway.errors import ApiError, JsonAnswer, error_body
from tandem_gateway.events import event
from tandem_gateway.generation import form_name
from tandem_gateway.problems import name_params
from tandem_gateway.response_items import ResponseItems
from tandem_gateway.responses_protocol import ResponseBody

ECHO_MARGIN = 100
"""How much deeper than in the check what is repeated may stand in an answer, or in Python's stack when it is made."""


@dataclass
class Responses:
    """One request: what its answers have in common."""

    body: ResponseBody
    request_id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, status: str, items: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        body = self.body
        given = body.model_dump(exclude_unset=True, by_alias=True)
        return {
            "id": f"resp_{self.request_id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "output": items,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "max_output_tokens": body.max_output_tokens,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": given.get("text") or {"format": {"type": "text"}},
            "tool_choice": given.get("tool_choice") or "auto",
            "tools": given.get("tools") or [],
            "top_p": body.top_p,
            "usage": None,
            **fields,
        }

    def end(self, finish: inference_pb2.Finish, usage: inference_pb2.Usage, items: ResponseItems) -> dict[str, Any]:
        """The complete response."""
        fields: dict[str, Any] = {"usage": _usage(usage)}
        status = _status(finish)
        if finish.reason == inference_pb2.FINISH_REASON_LENGTH:
            fields["incomplete_details"] = {"reason": "max_output_tokens"}
        return self.answer(status, items.items, **fields)


async def create(engine: Engine, request: Request, body: ResponseBody) -> Any:
    metadata = metadata_of(request)
    options = body.options()
    form = form_name(options)
    name_params(
        request,
        response_format="text.format" if form == "response_format" else form,
        max_tokens="max_output_tokens",
        messages="input",
    )
    _check_echo(body)
    request_id = options.request_id or request_id_of(request)
    work = plan_chat(
        engine, metadata, options, body.messages(), request_id, max_tokens=body.max_output_tokens, logprobs=None
    )
    plan = await while_connected(request, work)
    if body.stream:
        model = body.model or await engine.model_name(metadata)
        stream = engine.stream([plan.fields], metadata)
        items = await with_first(stream, request, stream.cancel)
        return EventStream(_numbered(_events(Responses(body, request_id, model), plan, items)), stream.cancel)
    response = await while_connected(request, engine.generate(plan.fields, metadata))
    [choice] = response.choices
    output = ResponseItems()
    for piece in plan.reader().read(choice.text, is_last=True):
        output.take(piece)
    output.close(_item_status(choice.finish))
    # Made here, as FastAPI would go through the values that are repeated, however deep they are nested.
    return JsonAnswer(Responses(body, request_id, response.model).end(choice.finish, response.usage, output))


def _check_echo(body: ResponseBody) -> None:
    """Raises ApiError for values that the answer can't repeat: what is no JSON, though Python reads it, or too deep."""
    echo: Any = body.model_dump(exclude_unset=True, by_alias=True)
    for _ in range(ECHO_MARGIN):
        echo = [echo]
    try:
        json.dumps(echo, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body can't be repeated in the answer: {error}") from error


async def _events(
    responses: Responses, plan: ChatPlan, items: "AsyncIterator[tuple[int, inference_pb2.GenerateStreamResponse]]"
) -> AsyncIterator[dict[str, Any]]:
    for name in ("response.created", "response.in_progress"):
        yield {"type": name, "response": responses.answer("in_progress", [])}
    reader, output = plan.reader(), ResponseItems()
    finish, usage = inference_pb2.Finish(), inference_pb2.Usage()
    async for _, message in items:
        is_last = message.HasField("finish")
        for piece in reader.read(message.text_delta, is_last=is_last):
            for each in output.take(piece):
                yield each
        if is_last:
            finish = message.finish
        if message.HasField("usage"):
            usage = message.usage
    for each in output.close(_item_status(finish)):
        yield each
    is_complete = finish.reason == inference_pb2.FINISH_REASON_STOP
    name = "response.completed" if is_complete else "response.incomplete"
    yield {"type": name, "response": responses.end(finish, usage, output)}


async def _numbered(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """The events as they are sent. Where they end with an error, it is the last event."""
    number = 0
    try:
        async for each in events:
            yield event({**each, "sequence_number": number}, each["type"])
            number += 1
    except Exception as failure:
        error = error_body(failure)["error"]
        code = error["code"] or error["type"]
        fields = {"code": code, "message": error["message"], "param": error["param"], "error": error}
        yield event({"type": "error", "sequence_number": number, **fields}, "error")


def _status(finish: inference_pb2.Finish) -> str:
    statuses = {inference_pb2.FINISH_REASON_STOP: "completed", inference_pb2.FINISH_REASON_LENGTH: "incomplete"}
    return statuses.get(finish.reason, "cancelled")


def _item_status(finish: inference_pb2.Finish) -> str:
    return "completed" if finish.reason == inference_pb2.FINISH_REASON_STOP else "incomplete"


def _usage(usage: inference_pb2.Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_output_tokens,
        # The scheduler does not tell them apart.
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }
