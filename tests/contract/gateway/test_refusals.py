"""What the HTTP gateway refuses, and how, and what ends its requests."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from tandem_scheduler.service import SchedulerService
from tandem_shared.config import SchedulerSettings
from tests.contract.gated_worker import gated_runner, open_gate
from tests.contract.gateway.refusal import PROMPT, refusal
from tests.contract.gateway.wrong_bodies import WRONG_BODIES
from tests.contract.services import MODEL, WAIT_S, Services
from tests.support.chats import USER
from tests.support.gateway import Gateway, head, read_answer


async def test_what_is_wrong_is_said_in_openais_form(gateway: Gateway) -> None:
    for path, body, status, param in WRONG_BODIES:
        answer = await gateway.post(path, body)
        error = answer.error()
        assert answer.status == status, (path, body, error)
        assert param is None or error["param"] == param, (body, error)
        assert answer.headers["x-request-id"]
    assert (await gateway.get("/v1/completions")).status == 405


@pytest.mark.parametrize(
    ("body", "content_type", "said"),
    [
        (b'{"prompt": "a"}', "application/x-www-form-urlencoded", "Content-Type: application/json"),
        (b'{"prompt": "a"}', "text/plain", "Content-Type: application/json"),
        (b"", "application/json", "there is no body"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b'{"prompt": "a",}', "application/json", "is no JSON"),
    ],
)
async def test_a_body_that_is_no_json_object_is_told_why(
    gateway: Gateway, body: bytes, content_type: str, said: str
) -> None:
    """curl sends the first one where its header was forgotten."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(head("POST", "/v1/completions", len(body), {"content-type": content_type}) + body)
    answer = await asyncio.wait_for(read_answer(reader), WAIT_S)
    writer.close()
    assert answer.status == 400 and said in answer.error()["message"] and answer.error()["param"] is None


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /version HTTP/1.1\r\nx-long: ", b"a" * 8192),
        (b"GET /version HTTP/1.1\r\n", b"x-many: a\r\n" * 800),
        (b"POST /tokenize HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"x-trailer: a\r\n" * 800),
    ],
)
async def test_a_head_or_a_trailer_without_end_is_not_kept(gateway: Gateway, start: bytes, more: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    answer = asyncio.create_task(read_answer(reader))
    writer.write(start)
    num_sent = 0
    while not answer.done() and num_sent < 10**7:
        writer.write(more)
        num_sent += len(more)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(0)
    with contextlib.suppress(ConnectionError):
        assert (await answer).status == 400
    assert num_sent < 10**7
    writer.close()


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"\x16\x03\x01 no HTTP\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nno size\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\nauthorization: %b\r\n\r\n" % (b"a" * 7200), 401),
        (b"GET /tokenize/ HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", 404),
    ],
    ids=["no HTTP", "no chunk", "large key", "slash"],
)
async def test_bytes_that_no_client_should_send_are_answered_in_the_same_form(
    gateway: Gateway, start: bytes, status: int
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(start)
    answer = await asyncio.wait_for(read_answer(reader), WAIT_S)
    writer.close()
    assert answer.status == status and answer.error()["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_repeats_whatever_it_was_asked(gateway: Gateway, stream: bool) -> None:
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    text = {"format": {"type": "text", "name": "\udc00\ud800"}}
    body = {"input": "a", "max_output_tokens": 2, "text": text, "metadata": {"deep": deep}, "stream": stream}
    answer = await gateway.post("/v1/responses", body)
    assert answer.status == 200
    last = answer.body.rpartition(b"data: ")[2] if stream else answer.body
    said = json.loads(last)["response"] if stream else json.loads(last)
    assert (said["text"], said["metadata"]) == (text, {"deep": deep})


@pytest.mark.parametrize("cut", [0, 40, 130, 160])
async def test_a_request_that_asks_for_http_2_is_served(gateway: Gateway, cut: int) -> None:
    body = b'{"prompt": "ROMEO", "max_tokens": 2}'
    upgrade = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAEAAEAA"}
    start = head("POST", "/v1/completions", len(body), upgrade)
    chunked = start.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
    last = head("GET", "/version", 0)
    data = start + body + chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) + last
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(data[:cut])
    await writer.drain()
    writer.write(data[cut:])
    answers = await asyncio.wait_for(reader.read(), WAIT_S)
    writer.close()
    assert answers.count(b"HTTP/1.1 200 OK") == 3 and answers.count(b'"text_completion"') == 2, answers


async def test_what_is_no_http_behind_a_stream_ends_the_connection_after_it(gateway: Gateway) -> None:
    body = b'{"prompt": "ROMEO", "max_tokens": 4, "stream": true}'
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    start = head("POST", "/v1/completions", len(body), {"connection": "keep-alive"})
    writer.write(start + body + b"\0 no HTTP\r\n\r\n")
    data = await asyncio.wait_for(reader.read(), WAIT_S)
    writer.close()
    assert data.startswith(b"HTTP/1.1 200") and data.count(b"HTTP/1.1") <= 2
    assert b"[DONE]" in data.partition(b"HTTP/1.1 400")[0]


async def test_request_ids_pass_through_and_live_ones_are_taken(folder: Path) -> None:
    runner = gated_runner(1)
    async with Services(runner, tokenizer=str(folder)) as services, Gateway(services.address) as gateway:
        headers = {"x-request-id": "mine"}
        first = asyncio.create_task(gateway.post("/v1/completions", {"prompt": PROMPT}, headers))
        await services.wait_load(lambda load: load.num_running_sequences == 1, "the request runs")
        second = await gateway.post("/v1/completions", {"prompt": PROMPT}, headers)
        assert second.status == 409 and second.headers["x-request-id"] == "mine"
        open_gate(runner)
        answer = await first
        assert answer.status == 200
        assert answer.headers["x-request-id"] == "mine" and answer.json()["id"] == "cmpl-mine"


async def test_a_client_that_goes_away_ends_its_request(folder: Path) -> None:
    runner = gated_runner(1)
    async with Services(runner, tokenizer=str(folder)) as services, Gateway(services.address) as gateway:

        async def wait_sequences(count: int) -> None:
            await services.wait_load(
                lambda load: load.num_running_sequences + load.num_waiting_sequences == count, f"{count} sequences"
            )

        async def start(number: int, stream: bool, behind: bytes) -> Callable[[], None]:
            body = f'{{"prompt": "ROMEO", "max_tokens": 500, "stream": {str(stream).lower()}}}'.encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(head("POST", "/v1/completions", len(body), {"connection": "keep-alive"}) + body + behind)
            await wait_sequences(number)
            if stream:
                open_gate(runner, 4)
                await asyncio.wait_for(reader.readuntil(b"data: "), WAIT_S)
            return writer.close

        # Also with another request that waits for its turn on the same connection.
        cases = [(stream, behind) for stream in (True, False) for behind in (b"", head("GET", "/version", 0))]
        closes = [await start(number, *case) for number, case in enumerate(cases, 1)]
        for close in closes:
            close()
        open_gate(runner, 4)
        await wait_sequences(0)
        open_gate(runner)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_is_refused_ends_the_others_of_its_request(folder: Path, stream: bool) -> None:
    runner = gated_runner(2, permits=1)
    async with Services(runner, tokenizer=str(folder)) as services, Gateway(services.address) as gateway:
        body = {"prompt": ["ROMEO", "a " * 9000], "max_tokens": 500, "ignore_eos": True, "stream": stream}
        answer = await gateway.post("/v1/completions", body)
        # In a stream it may come after something of the other prompt.
        assert answer.status == 400 or (stream and b'data: {"error":' in answer.body)
        open_gate(runner, 4)
        await services.wait_load(
            lambda load: load.num_running_sequences + load.num_waiting_sequences == 0, "neither is left"
        )
        open_gate(runner)


async def test_a_full_queue_is_429_with_the_time_to_wait(folder: Path) -> None:
    runner = gated_runner(1)
    settings: dict[str, Any] = {"tokenizer": str(folder), "max_num_waiting": 1, "max_num_seqs": 1}
    async with Services(runner, **settings) as services, Gateway(services.address) as gateway:
        body = {"prompt": PROMPT, "max_tokens": 4}
        open_calls = [asyncio.create_task(gateway.post("/v1/completions", body))]
        await services.wait_load(lambda load: load.num_running_sequences == 1, "one runs")
        open_calls.append(asyncio.create_task(gateway.post("/v1/completions", body)))
        await services.wait_load(lambda load: load.num_waiting_sequences == 1, "one waits")
        for stream in (False, True):
            answer = await gateway.post("/v1/completions", {**body, "stream": stream})
            assert answer.status == 429 and answer.error()["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1
        # OpenAI's client tries again by itself, after that time.
        retrying = gateway.new_client(max_retries=3)
        patient = asyncio.create_task(retrying.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4))
        await asyncio.sleep(0.2)
        open_gate(runner)
        assert (await patient).usage.completion_tokens == 4
        assert [answer.status for answer in await asyncio.gather(*open_calls)] == [200, 200]
        await retrying.close()


async def test_an_error_within_a_stream_reaches_the_client(folder: Path) -> None:
    runner = gated_runner(1)
    async with Services(runner, tokenizer=str(folder)) as services, Gateway(services.address) as gateway:
        client = gateway.client
        asked: dict[str, Any] = {"model": MODEL, "stream": True, "extra_body": {"ignore_eos": True}}
        creating = asyncio.gather(
            client.completions.create(prompt=PROMPT, max_tokens=500, **asked),
            client.chat.completions.create(messages=[USER], max_tokens=500, **asked),
            client.responses.create(input=PROMPT, max_output_tokens=500, **asked),
        )
        await services.wait_load(
            lambda load: load.num_running_sequences + load.num_waiting_sequences == 3, "all are there"
        )
        open_gate(runner, 6)
        streams: list[Any] = await creating
        for stream in streams:
            await anext(aiter(stream))
        stopping = asyncio.create_task(services.service.stop(0))
        for stream in streams:
            with pytest.raises(openai.APIError, match="stopp"):
                async for _ in stream:
                    pass
        open_gate(runner)
        await stopping


class Keys(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the right key, as a scheduler's own interceptor may."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong key")

        if dict(details.invocation_metadata).get("authorization") == "Bearer right":
            return await continuation(details)
        handler = await continuation(details)
        kind = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return kind(refuse, handler.request_deserializer, handler.response_serializer)


async def test_keys_are_checked_by_the_scheduler(services: Services) -> None:
    settings = SchedulerSettings(model=MODEL, port=0, api_server_count=0, worker_address=services.worker_address)
    await services.service.stop(0)
    service = SchedulerService(settings, interceptors=[Keys()])
    async with Gateway(f"127.0.0.1:{await service.start()}") as gateway:
        for stream in (False, True):
            error = await refusal(gateway.client.completions.create(model=MODEL, prompt=PROMPT, stream=stream))
            assert isinstance(error, openai.AuthenticationError) and error.code == "invalid_api_key"
        right = gateway.new_client("right")
        assert (await right.models.list()).data
        await right.close()
    await service.stop(0)


async def test_without_a_scheduler_or_a_worker_it_is_503() -> None:
    async with Gateway("127.0.0.1:1") as gateway:
        answers = [await gateway.post("/v1/completions", {"prompt": PROMPT}), await gateway.get("/health")]
        assert [answer.status for answer in answers] == [503, 503]
        assert all("retry-after" in answer.headers for answer in answers)
        assert (await gateway.get("/version")).status == 200


async def test_bodies_are_bounded_in_size_and_time(services: Services) -> None:
    async with Gateway(services.address, http_max_body_bytes=2000, http_body_timeout_s=0.3) as gateway:
        answer = await gateway.post("/v1/completions", {"prompt": "a" * 3000})
        assert answer.status == 413 and answer.error()["type"] == "invalid_request_error"

        async def send(start: bytes) -> int:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(start)
            answer = await asyncio.wait_for(read_answer(reader), WAIT_S)
            writer.close()
            return answer.status

        chunked = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        assert await send(chunked + b"bb8\r\n" + b"a" * 3000 + b"\r\n") == 413
        assert await send(head("POST", "/v1/completions", 100) + b"{") == 408
        assert await send(head("POST", "/v1/completions", 3) + b"{a}") == 400
        assert (await gateway.post("/v1/completions", {"prompt": "a", "max_tokens": 2})).status == 200


async def test_a_request_that_the_scheduler_finds_too_large_is_413(folder: Path) -> None:
    async with (
        Services(tokenizer=str(folder), max_request_bytes=1024) as services,
        Gateway(services.address) as gateway,
    ):
        for stream in (False, True):
            answer = await gateway.post("/v1/completions", {"prompt": "a" * 3000, "stream": stream})
            assert answer.status == 413 and "larger than the scheduler takes" in answer.error()["message"]
