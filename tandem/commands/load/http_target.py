"""A server with OpenAI's HTTP API, whosoever it is."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tandem.commands.load.target import Received, RequestFailed
from tandem.commands.load.workload import Ask

CONNECT_TIMEOUT_S = 10.0
SHOWN_CHARACTERS = 300
"""How much of an error's body is shown."""


def model_of(base_url: str, api_key: str | None) -> str:
    """The first model that the server lists. Raises RequestFailed."""
    try:
        reply = httpx2.get(f"{base_url}/v1/models", headers=_headers(api_key), timeout=CONNECT_TIMEOUT_S)
        reply.raise_for_status()
        return str(reply.json()["data"][0]["id"])
    except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
        raise RequestFailed(f"{base_url}/v1/models names no model: {error}") from error


@dataclass(frozen=True)
class HttpTarget:
    base_url: str
    """The address up to what comes before /v1."""
    model: str
    has_extensions: bool
    """Whether the server knows ignore_eos and other fields of vLLM's. Without them outputs may end early."""
    api_key: str | None = field(repr=False)

    def description(self) -> dict[str, Any]:
        return {"api": "HTTP", "server": self.base_url, "model": self.model}

    def encode(self, ask: Ask) -> bytes:
        body = {
            "model": self.model,
            "prompt": ask.prompt,
            "max_tokens": ask.num_output_tokens,
            "temperature": ask.temperature,
            "top_p": 1.0,
            "seed": ask.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.has_extensions:
            # Every field is set, so that a model's own defaults do not change what is measured.
            body |= {"ignore_eos": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        return json.dumps(body).encode()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator["HttpConnection"]:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S)
        async with httpx2.AsyncClient(headers=_headers(self.api_key), limits=limits, timeout=timeout) as client:
            yield HttpConnection(client, f"{self.base_url}/v1/completions")

    def parse(self, received: Received) -> tuple[list[float], list[int]]:
        times: list[float] = []
        num_tokens = None
        for at, event in _events(received):
            if "error" in event:
                raise RequestFailed(f"the stream ended with {json.dumps(event['error'])[:SHOWN_CHARACTERS]}")
            # The last message of some servers has the reason of the end and no text.
            if any(choice.get("text") or choice.get("finish_reason") is None for choice in event.get("choices") or ()):
                times.append(at)
            if event.get("usage"):
                num_tokens = int(event["usage"]["completion_tokens"])
        if not times:
            return [], []
        # The messages do not say how many tokens they have, only the usage at the end does.
        counts = [1] * len(times)
        counts[-1] += (num_tokens or len(times)) - len(times)
        return times, counts


class HttpConnection:
    def __init__(self, client: httpx2.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url

    async def stream(self, request: bytes) -> Received:
        received = Received(time.monotonic(), [], [])
        try:
            async with self._client.stream("POST", self._url, content=request) as reply:
                if reply.status_code != httpx2.codes.OK:
                    text = (await reply.aread()).decode(errors="replace")
                    raise RequestFailed(f"HTTP {reply.status_code}: {text[:SHOWN_CHARACTERS]}")
                async for part in reply.aiter_raw():
                    received.times.append(time.monotonic())
                    received.parts.append(part)
        except httpx2.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        return received


def _events(received: Received) -> Iterator[tuple[float, dict[str, Any]]]:
    """The server-sent events of an answer, with the time at which each was complete. Raises RequestFailed if the last
    one is missing.
    """
    line = b""
    for at, part in zip(received.times, received.parts, strict=True):
        *lines, line = (line + part).split(b"\n")
        for each in lines:
            data = each.removeprefix(b"data:").strip() if each.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                try:
                    yield at, json.loads(data)
                except ValueError as error:
                    raise RequestFailed(f"an event is no JSON: {data[:SHOWN_CHARACTERS]!r}") from error
    raise RequestFailed("the stream ended without [DONE]")


def _headers(api_key: str | None) -> dict[str, str]:
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    return headers if api_key is None else {**headers, "authorization": f"Bearer {api_key}"}
