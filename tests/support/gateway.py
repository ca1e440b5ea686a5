"""An HTTP gateway in the test's own event loop, its clients, and plain HTTP requests to it."""

import asyncio
import json
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import openai
import uvicorn

from tandem_gateway.server import server_config
from tandem_shared.gateway_settings import GatewaySettings

HOST = "127.0.0.1"


class Gateway:
    """`async with` starts the gateway on a free port, and stops it."""

    def __init__(self, scheduler_address: str, **settings: Any) -> None:
        """settings: fields of GatewaySettings."""
        self._settings = GatewaySettings(scheduler_address=scheduler_address, **settings)

    async def __aenter__(self) -> "Gateway":
        listener = socket.create_server((HOST, 0))
        self.port = listener.getsockname()[1]
        self._server = uvicorn.Server(server_config(self._settings))
        self._task = asyncio.create_task(self._server.serve([listener]))
        while not self._server.started:
            await asyncio.sleep(0.005)
            assert not self._task.done(), self._task.result()
        self.client = self.new_client()
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.client.close()
        self._server.should_exit = True
        await self._task

    def new_client(self, api_key: str = "none", **options: Any) -> openai.AsyncOpenAI:
        options = {"max_retries": 0, **options}
        return openai.AsyncOpenAI(base_url=f"http://{HOST}:{self.port}/v1", api_key=api_key, **options)

    async def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> "Answer":
        return await plain_request(self.port, "POST", path, json.dumps(body).encode(), headers)

    async def get(self, path: str) -> "Answer":
        return await plain_request(self.port, "GET", path)


@dataclass
class Answer:
    """The answer to a plain HTTP request."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of a stream's events but the last, which must be [DONE]."""
        *events, last = [line.removeprefix("data: ") for line in self.body.decode().split("\n") if line]
        assert last == "[DONE]"
        return [json.loads(each) for each in events]

    def error(self) -> dict[str, Any]:
        """The error in OpenAI's form, with no more and no less than it has."""
        [(name, error)] = self.json().items()
        assert name == "error" and set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
        return dict(error)


async def plain_request(
    port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> Answer:
    """A request on a connection of its own."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(head(method, path, len(body), headers) + body)
        return await read_answer(reader)
    finally:
        writer.close()


def head(method: str, path: str, num_bytes: int, headers: dict[str, str] | None = None) -> bytes:
    fields = {
        "host": HOST,
        "content-type": "application/json",
        "content-length": str(num_bytes),
        "connection": "close",
        **(headers or {}),
    }
    return "".join([f"{method} {path} HTTP/1.1\r\n", *(f"{k}: {v}\r\n" for k, v in fields.items()), "\r\n"]).encode()


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The answer, read until the connection ends."""
    start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    data = await reader.read()
    while not reader.at_eof():
        data += await reader.read()
    if headers.get("transfer-encoding") == "chunked":
        data = _unchunked(data)
    return Answer(int(start.split()[1]), headers, data)


def _unchunked(data: bytes) -> bytes:
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        parts.append(data[: int(size, 16)])
        data = data[int(size, 16) + 2 :]
    return b"".join(parts)
