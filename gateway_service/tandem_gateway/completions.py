"""/v1/completions: one or several prompts, each a text or token ids."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from tandem.outputs import FINISH_REASONS
from tandem.v1 import inference_pb2
from tandem_gateway.connection import (
    EventStream,
    events_or_error,
    metadata_of,
    request_id_of,
    while_connected,
    with_first,
)
from tandem_gateway.echo import Echo, read_echo
from tandem_gateway.engine import Engine, Fields
from tandem_gateway.events import TextEvents, event
from tandem_gateway.generation import form_name, form_of, is_plain, request_fields, stop_reason_of, usage_of
from tandem_gateway.logprobs import completion_logprobs, prompt_logprobs
from tandem_gateway.problems import name_params, refuse
from tandem_gateway.protocol import MAX_PROMPTS, CompletionBody


@dataclass
class Completions:
    """One request: what its answers have in common."""

    body: CompletionBody
    request_id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def requests(self) -> list[Fields]:
        """A gRPC request for each prompt."""
        body = self.body
        body.check_unknown()
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise refuse("best_of", "is not supported, unless it is n")
        form = form_of(body)
        max_tokens = body.max_tokens
        if body.echo:
            if body.stream and body.logprobs is not None and (body.n or 1) > 1:
                # A choice may begin before all of the prompt has been told of, which the first one does not.
                raise refuse("echo", "of log-probabilities in a stream needs n to be 1")
            body.prompt_logprobs = body.logprobs if body.prompt_logprobs is None else body.prompt_logprobs
            # The scheduler makes a token at least, which the answer then leaves out.
            max_tokens = 1 if max_tokens == 0 else max_tokens
        prompts = _prompts(body.prompt)
        ids = [self.request_id] if len(prompts) == 1 else [f"{self.request_id}-{i}" for i in range(len(prompts))]
        return [
            request_fields(body, prompt, id_, max_tokens=max_tokens, logprobs=body.logprobs, form=form)
            for prompt, id_ in zip(prompts, ids, strict=True)
        ]

    def answer(self, model: str, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        common = {"id": f"cmpl-{self.request_id}", "object": "text_completion", "created": self.created}
        return {**common, "model": model, "choices": choices, **fields}

    def is_bare(self) -> bool:
        """Whether the answer has the prompt alone."""
        return bool(self.body.echo and self.body.max_tokens == 0)

    def choice(self, index: int, text: str, finish: inference_pb2.Finish | None) -> dict[str, Any]:
        reason = None if finish is None else FINISH_REASONS.get(finish.reason)
        stop_reason = None if finish is None else stop_reason_of(finish, self.body)
        text = "" if self.is_bare() else text
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": stop_reason}


async def create(engine: Engine, request: Request, body: CompletionBody) -> Any:
    name_params(request, response_format=form_name(body), text="prompt", token_ids="prompt")
    completions = Completions(body, body.request_id or request_id_of(request))
    requests, metadata = completions.requests(), metadata_of(request)
    echoes: list[Echo] = []
    if body.echo:
        has_logprobs = body.logprobs is not None
        reading = (read_echo(engine, each["prompt"], metadata, has_logprobs=has_logprobs) for each in requests)
        echoes = await while_connected(request, asyncio.gather(*reading))
    if body.stream:
        model = body.model or await engine.model_name(metadata)
        stream = engine.stream(requests, metadata)
        items = await with_first(stream, request, stream.cancel)
        return EventStream(events_or_error(_events(completions, model, items, echoes)), stream.cancel)
    responses = await while_connected(request, engine.generate_all(requests, metadata))
    return _whole(completions, responses, echoes)


def _whole(
    completions: Completions, responses: list[inference_pb2.GenerateResponse], echoes: list[Echo]
) -> dict[str, Any]:
    body = completions.body
    choices = []
    for number, response in enumerate(responses):
        for each in response.choices:
            index = number * (body.n or 1) + each.choice_index
            choice = completions.choice(index, each.text, each.finish)
            start = 0
            if echoes:
                echoes[number].tokens = list(response.prompt_logprobs)
                start = echoes[number].num_characters()
            if body.logprobs is not None:
                choice["logprobs"] = completion_logprobs(() if completions.is_bare() else each.logprobs, start)
            if echoes:
                echoes[number].put_before(choice)
            if body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(response.prompt_logprobs)
            choices.append(choice)
    return completions.answer(responses[0].model, choices, usage=usage_of([response.usage for response in responses]))


async def _events(
    completions: Completions,
    model: str,
    items: "AsyncIterator[tuple[int, inference_pb2.GenerateStreamResponse]]",
    echoes: list[Echo],
) -> AsyncIterator[bytes]:
    body = completions.body
    usages: list[inference_pb2.Usage] = []
    offsets: dict[int, int] = {}
    with_prompt: set[int] = set()
    usage_field = {"usage": None} if body.includes_usage() else {}

    texts: dict[int, TextEvents] = {}

    def text_event(index: int, text: str) -> bytes:
        if index not in texts:
            texts[index] = TextEvents(
                lambda text: event(completions.answer(model, [completions.choice(index, text, None)], **usage_field))
            )
        return texts[index].of(text)

    async for number, message in items:
        index = number * (body.n or 1) + message.choice_index
        has_echo = False
        if echoes:
            echoes[number].tokens += message.prompt_logprobs
            # By then the whole prompt has been told of.
            if index not in offsets and (message.token_ids or message.HasField("finish")):
                offsets[index] = echoes[number].num_characters()
                has_echo = True
        if is_plain(message) and not has_echo:
            if not completions.is_bare():
                yield text_event(index, message.text_delta)
            continue
        finish = message.finish if message.HasField("finish") else None
        choice = completions.choice(index, message.text_delta, finish)
        if body.logprobs is not None and message.logprobs and not completions.is_bare():
            choice["logprobs"] = completion_logprobs(message.logprobs, offsets.get(index, 0))
            offsets[index] = offsets.get(index, 0) + sum(len(each.text) for each in message.logprobs)
        if has_echo:
            echoes[number].put_before(choice)
        if message.prompt_logprobs:
            choice["prompt_logprobs"] = prompt_logprobs(message.prompt_logprobs, is_start=number not in with_prompt)
            with_prompt.add(number)
        if message.HasField("usage"):
            usages.append(message.usage)
        yield event(completions.answer(model, [choice], **usage_field))
    if body.includes_usage():
        yield event(completions.answer(model, [], usage=usage_of(usages)))


def _prompts(prompt: str | list[Any]) -> list[Fields]:
    if isinstance(prompt, str):
        return [{"text": prompt}]
    if prompt and isinstance(prompt[0], int):
        return [{"token_ids": {"ids": prompt}}]
    if not prompt:
        raise refuse("prompt", f"must have 1 to {MAX_PROMPTS} prompts, has none")
    return [{"text": each} if isinstance(each, str) else {"token_ids": {"ids": each}} for each in prompt]
