"""The load generator's HTTP client against the gateway, and against servers that break off."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tandem.commands.load.http_target import HttpTarget, events_of
from tandem.commands.load.target import RequestFailed
from tandem.commands.load.workload import Ask
from tests.contract.services import MODEL
from tests.support.gateway import HOST, Gateway

ASK = Ask([5, 6, 7], 12, 0.0, 3, 0.0)


def target(port: int, *, is_chat: bool = False) -> HttpTarget:
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    return HttpTarget(f"http://{HOST}:{port}{path}", MODEL, is_chat, has_extensions=True, api_key=None)


async def test_streams_are_those_that_openais_client_sees_and_connections_are_kept(gateway: Gateway) -> None:
    whole = await gateway.client.completions.create(
        model=MODEL, prompt=[5, 6, 7], max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    )
    measured = target(gateway.port)
    async with measured.connect() as connections:
        for _ in range(3):
            received = await connections.stream(measured.encode(ASK))
            times, counts = measured.parse(received)
            assert sum(counts) == 12 and times == sorted(times) and received.sent <= times[0]
            parts = [event["choices"][0]["text"] for _, event in events_of(received) if event["choices"]]
            assert "".join(parts) == whole.choices[0].text
            assert len(connections.idle) == 1
        both = await asyncio.gather(*(connections.stream(measured.encode(ASK)) for _ in range(2)))
        assert [sum(measured.parse(each)[1]) for each in both] == [12, 12] and len(connections.idle) == 2
        with pytest.raises(RequestFailed, match="HTTP 400"):
            await connections.stream(b"{}")


async def test_chats_are_counted(gateway: Gateway) -> None:
    measured = target(gateway.port, is_chat=True)
    async with measured.connect() as connections:
        received = await connections.stream(measured.encode(Ask("time year", 12, 0.0, 3, 0.0)))
    times, counts = measured.parse(received)
    assert sum(counts) == 12 and len(times) == len(counts) > 1


@asynccontextmanager
async def server(answer: bytes) -> AsyncIterator[int]:
    """A server that answers each request with these bytes, and closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, HOST, 0) as listening:
        yield listening.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"", "connection was lost"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nda", "without .DONE."),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nda", "without .DONE."),
        (b"220 ready\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 5\r\n\r\nlater", "HTTP 503: later"),
    ],
)
async def test_what_breaks_off_has_failed(answer: bytes, problem: str) -> None:
    async with server(answer) as port:
        measured = target(port)
        async with measured.connect() as connections:
            with pytest.raises(RequestFailed, match=problem):
                measured.parse(await connections.stream(measured.encode(ASK)))


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    events = b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\ndata: [DONE]\n\n'
    async with server(b"HTTP/1.0 200 OK\r\n\r\n" + events) as port:
        measured = target(port)
        async with measured.connect() as connections:
            assert measured.parse(await connections.stream(measured.encode(ASK)))[1] == [1]
