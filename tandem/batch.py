"""Runs many prompts at once through one client, and gathers their outputs and errors."""

import asyncio
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import grpc

from tandem.async_client import AsyncTandemClient
from tandem.chat import Chat
from tandem.outputs import RequestOutput, read_reply
from tandem.prompts import Item
from tandem.v1 import inference_pb2
from tandem_shared.errors import QueueFull, TandemError

T = TypeVar("T")


class ProgressBar(Protocol):
    """What is used of a tqdm bar."""

    def update(self, n: int, /) -> Any: ...
    def set_postfix_str(self, s: str, refresh: bool) -> Any: ...
    def close(self) -> Any: ...


@dataclass
class BatchResult:
    """What became of each prompt, by index: an output or an error."""

    outputs: list[RequestOutput | None]
    errors: dict[int, Exception] = field(default_factory=dict)


class Progress:
    """A progress bar of prompts, with the rates of those that are done.

    The prefill rate counts prompt tokens that were computed, so without those from the prefix cache; the decode rate
    counts output tokens. Both are averages since the start.
    """

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self._started = time.monotonic()
        self._num_prefilled = 0
        self._num_decoded = 0

    def add(self, usage: inference_pb2.Usage | None) -> None:
        """One more prompt is done. usage is None if it failed."""
        if usage is not None:
            self._num_prefilled += max(usage.num_prompt_tokens - usage.num_cached_tokens, 0)
            self._num_decoded += usage.num_output_tokens
            passed_s = max(time.monotonic() - self._started, 1e-9)
            prefill, decode = self._num_prefilled / passed_s, self._num_decoded / passed_s
            self._bar.set_postfix_str(f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s", refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()


async def run_batch(
    client: AsyncTandemClient, items: Sequence[Item], num_at_once: int, progress: Progress | None
) -> BatchResult:
    """Generates for all items, num_at_once at a time, in their order. A full server is waited for. Cancelling this
    aborts the requests.
    """
    result = BatchResult([None] * len(items))
    waiting = iter(enumerate(items))

    async def work() -> None:
        # All workers share the iterator.
        for index, item in waiting:
            usage = None
            try:
                output, usage = await _generate(client, item)
                result.outputs[index] = output
            except (TandemError, grpc.RpcError) as error:
                result.errors[index] = error
            if progress is not None:
                progress.add(usage)

    async with asyncio.TaskGroup() as workers:
        for _ in range(min(num_at_once, len(items))):
            workers.create_task(work())
    return result


async def _generate(client: AsyncTandemClient, item: Item) -> tuple[RequestOutput, inference_pb2.Usage]:
    prompt, params = item.prompt, item.params
    text = prompt if isinstance(prompt, str) else None
    ids: Any = prompt
    if isinstance(prompt, str | Chat):
        # A call of its own tells the prompt's ids, which an output has.
        ids = await _until_taken(lambda: client.tokenize(prompt))
    wants_prompt = params.prompt_logprobs is not None
    asked: dict[str, Any] = {"cache_salt": item.cache_salt, "priority": item.priority}
    if wants_prompt or params.logprobs is not None or params.logprob_token_ids:
        # A reply has a limit, which log-probabilities may exceed.
        reply = await _until_taken(lambda: _join(client.generate_stream(ids, params, **asked)))
    else:
        reply = await _until_taken(lambda: client.generate(ids, params, **asked))
    return read_reply(reply, text, ids, has_prompt_logprobs=wants_prompt), reply.usage


async def _until_taken(call: Callable[[], Awaitable[T]]) -> T:
    """Makes a call again and again while the server is full."""
    while True:
        try:
            return await call()
        except QueueFull as error:
            await asyncio.sleep(error.retry_after_s)


async def _join(deltas: AsyncIterable[inference_pb2.GenerateStreamResponse]) -> inference_pb2.GenerateResponse:
    """The reply that a stream adds up to."""
    reply = inference_pb2.GenerateResponse()
    texts: dict[int, list[str]] = {}
    async for delta in deltas:
        while len(reply.choices) <= delta.choice_index:
            reply.choices.add(choice_index=len(reply.choices))
        choice = reply.choices[delta.choice_index]
        texts.setdefault(delta.choice_index, []).append(delta.text_delta)
        choice.token_ids.extend(delta.token_ids)
        choice.logprobs.extend(delta.logprobs)
        if delta.HasField("finish"):
            choice.finish.CopyFrom(delta.finish)
        if delta.HasField("usage"):
            reply.usage.CopyFrom(delta.usage)
        reply.prompt_logprobs.extend(delta.prompt_logprobs)
        reply.request_id = delta.request_id
    for index, parts in texts.items():
        reply.choices[index].text = "".join(parts)
    return reply
