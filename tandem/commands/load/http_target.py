"""A server with OpenAI's HTTP API, whosoever it is."""

import contextlib
import http.client
import json
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tandem.commands.load.http_connection import CONNECT_TIMEOUT_S, SHOWN_CHARACTERS, HttpConnections
from tandem.commands.load.target import Received, RequestFailed
from tandem.commands.load.workload import Ask
from tandem_shared.errors import TandemError

TEXTS = ("content", "reasoning_content", "reasoning")
"""The fields of a chat's delta that have text, by the names that servers give them."""


def model_of(base_url: str, api_key: str | None) -> str:
    """The first model that the server lists. Raises TandemError."""
    request = urllib.request.Request(f"{base_url}/v1/models", headers=_headers(api_key))
    # As the requests that are measured, without a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with contextlib.closing(opener.open(request, timeout=CONNECT_TIMEOUT_S)) as reply:
            return str(json.load(reply)["data"][0]["id"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise TandemError(f"{base_url}/v1/models names no model: {error}") from error


@dataclass(frozen=True)
class HttpTarget:
    url: str
    """What requests are posted to."""
    model: str
    is_chat: bool
    """Whether that takes conversations."""
    has_extensions: bool
    """Whether the server knows ignore_eos and other fields of vLLM's. Without them outputs may end early."""
    api_key: str | None = field(repr=False)

    def description(self) -> dict[str, Any]:
        return {"api": "HTTP", "server": self.url, "model": self.model}

    def encode(self, ask: Ask) -> bytes:
        if self.is_chat:
            asked = {
                "messages": [{"role": "user", "content": ask.prompt}],
                "max_completion_tokens": ask.num_output_tokens,
            }
        else:
            asked = {"prompt": ask.prompt, "max_tokens": ask.num_output_tokens}
        body: dict[str, Any] = {
            "model": self.model,
            **asked,
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
    async def connect(self) -> AsyncIterator[HttpConnections]:
        connections = HttpConnections(self.url, _headers(self.api_key))
        try:
            yield connections
        finally:
            connections.close()

    def parse(self, received: Received) -> tuple[list[float], list[int]]:
        times: list[float] = []
        num_tokens = None
        for at, event in events_of(received):
            if "error" in event:
                raise RequestFailed(f"the stream ended with {json.dumps(event['error'])[:SHOWN_CHARACTERS]}")
            if any(self._has_tokens(choice) for choice in event.get("choices") or ()):
                times.append(at)
            if event.get("usage"):
                num_tokens = int(event["usage"]["completion_tokens"])
        if not times:
            return [], []
        # The messages do not say how many tokens they have, only the usage at the end does.
        counts = [1] * len(times)
        counts[-1] += (num_tokens or len(times)) - len(times)
        return times, counts

    def _has_tokens(self, choice: dict[str, Any]) -> bool:
        if self.is_chat:
            # The first message of a chat has its role and no text.
            delta = choice.get("delta") or {}
            return any(delta.get(name) for name in TEXTS)
        # The last message of some servers has the reason of the end and no text.
        return bool(choice.get("text")) or choice.get("finish_reason") is None


def events_of(received: Received) -> Iterator[tuple[float, dict[str, Any]]]:
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
