"""Calls whose requests do not arrive, or are malformed, take neither places nor memory from others."""

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from tandem.v1 import inference_pb2
from tandem_shared.rpc import read_gate
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS, DEFAULT_MAX_REQUEST_BYTES
from tandem_shared.rpc.server import MAX_SMALL_CALLS_PER_CONNECTION, READ_BYTES, SMALL_REQUEST_BYTES
from tests.contract.services import HOST, WAIT_S, Services, wait_until
from tests.contract.test_hostile_connections import PREFACE, SETTINGS, frame

LONG_S = 1000.0
TOKENIZE = "/tandem.v1.InferenceService/Tokenize"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
SMALL_METHODS = [
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.channelz.v1.Channelz/GetServers",
    "/tandem.v1.ControlService/GetLoad",
    "/tandem.v1.ControlService/GetMetrics",
    "/tandem.v1.ControlService/Abort",
    "/tandem.v1.InferenceService/GetModelInfo",
    REFLECTION,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]
DATA, HEADERS, SETTINGS_KIND, WINDOW_UPDATE = 0, 1, 4, 8
INITIAL_WINDOW_SIZE = 4
MIB = 2**20


@pytest_asyncio.fixture
async def services() -> AsyncIterator[Services]:
    async with Services(max_num_seqs=4, max_num_waiting=4) as services:
        yield services


class RawConnection:
    """Calls as frames of HTTP/2. Each call may send `initial_window` bytes, and as many more as were `granted`."""

    def __init__(self) -> None:
        self.initial_window = 65535
        self.granted: Counter[int] = Counter()
        self._next_stream = 1

    async def open(self, address: str) -> None:
        self._reader, self._writer = await asyncio.open_connection(HOST, int(address.rpartition(":")[2]))
        self._writer.write(PREFACE + SETTINGS)
        self._reading = asyncio.create_task(self._read())

    async def close(self) -> None:
        self._writer.transport.abort()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def call(self, method: str, data: bytes = b"") -> None:
        """Opens a call and leaves it open. data is a part of its request, as gRPC frames it."""
        names = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x"}
        headers = b"".join(
            bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
            for name, value in (names | {"content-type": "application/grpc", "te": "trailers"}).items()
        )
        self._writer.write(frame(HEADERS, headers, flags=4, stream=self._next_stream))
        if data:
            self._writer.write(frame(DATA, data, stream=self._next_stream))
        self._next_stream += 2
        await self._writer.drain()

    async def _read(self) -> None:
        while True:
            header = await self._reader.readexactly(9)
            payload = await self._reader.readexactly(int.from_bytes(header[:3], "big"))
            if header[3] == SETTINGS_KIND:
                for name, value in struct.iter_unpack(">HI", payload):
                    self.initial_window = value if name == INITIAL_WINDOW_SIZE else self.initial_window
            elif header[3] == WINDOW_UPDATE:
                self.granted[int.from_bytes(header[5:], "big")] += int.from_bytes(payload, "big")


async def raw_connection(address: str, stack: AsyncExitStack) -> RawConnection:
    connection = RawConnection()
    await connection.open(address)
    stack.push_async_callback(connection.close)
    return connection


async def end_of(call: Any, num_responses: int = 0) -> grpc.aio.AioRpcError:
    responses = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(WAIT_S):
            async for response in call:
                responses.append(response)
    assert len(responses) == num_responses
    return caught.value


async def never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


@pytest.mark.parametrize("method", [TOKENIZE, "/tandem.v1.InferenceService/GenerateStream", *SMALL_METHODS])
async def test_a_call_that_sends_no_request_is_ended(
    services: Services, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(read_gate, "READ_TIMEOUT_S", 0.05)
    error = await end_of(services.channel.stream_stream(method)(never()))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "did not arrive within 0.05 s" in (error.details() or "")


@pytest.mark.parametrize(("num_connections", "num_calls"), [(10, 100), (30, 5)], ids=["that wait", "being read"])
async def test_calls_that_send_no_request_lock_nobody_out(
    monkeypatch: pytest.MonkeyPatch, num_connections: int, num_calls: int
) -> None:
    """Both for more calls than are read at once, which shorten each other's time, and for so few that all are read."""
    monkeypatch.setattr(read_gate, "READ_TIMEOUT_S", LONG_S)
    monkeypatch.setattr(read_gate, "HURRIED_READ_S", 0.2)
    async with AsyncExitStack() as stack:
        small_requests = Services(max_num_seqs=4, max_num_waiting=4, max_request_bytes=2**20)
        services = await stack.enter_async_context(small_requests)
        for _ in range(num_connections):
            connection = await raw_connection(services.address, stack)
            for _ in range(num_calls):
                await connection.call(TOKENIZE)
        own_connection = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(services.address, own_connection))
        check = health_pb2_grpc.HealthStub(channel).Check
        assert (await check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)).status
        await services.load()

        async def is_served() -> bool:
            try:
                await services.inference.Tokenize(inference_pb2.TokenizeRequest(text="polite"))
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                return False
            return True

        await wait_until(is_served, "a call is served")


@pytest.mark.parametrize("method", [TOKENIZE, "/grpc.health.v1.Health/Check"])
async def test_half_sent_requests_hold_memory_of_few_calls(
    services: Services, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """gRPC takes in a whole message once it is asked for one, and keeps it."""
    monkeypatch.setattr(read_gate, "READ_TIMEOUT_S", LONG_S)
    monkeypatch.setattr(read_gate, "HURRIED_READ_S", LONG_S)
    async with AsyncExitStack() as stack:
        connection = await raw_connection(services.address, stack)
        begun = b"\0" + struct.pack(">I", DEFAULT_MAX_REQUEST_BYTES - 100) + bytes(100)
        for _ in range(30):
            await connection.call(method, begun)

        def num_let_in() -> int:
            return sum(connection.initial_window + connection.granted[stream] > MIB for stream in range(1, 60, 2))

        async def is_any_let_in() -> bool:
            return num_let_in() > 0

        await wait_until(is_any_let_in, "a message is let in")
        await asyncio.sleep(0.3)
        assert num_let_in() <= READ_BYTES // DEFAULT_MAX_REQUEST_BYTES // 8
        # Calls of another connection are served meanwhile.
        assert await services.health_of("") == "SERVING"
        await services.inference.Tokenize(inference_pb2.TokenizeRequest(text="polite"))


@pytest.mark.parametrize("method", SMALL_METHODS)
async def test_a_large_request_of_a_service_of_small_ones_is_not_decoded(services: Services, method: str) -> None:
    fields = b"\xfa\x7f\0" * 1_000_000
    error = await end_of(services.channel.unary_stream(method)(fields))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"more than {SMALL_REQUEST_BYTES} bytes" in (error.details() or "")


async def test_many_empty_fields_to_tokenize_are_not_decoded(services: Services) -> None:
    error = await end_of(services.channel.unary_stream(TOKENIZE)(b"\xfa\x7f\0" * 1_000_000))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "beside the text" in (error.details() or "")


@pytest.mark.parametrize("is_large", [True, False], ids=["is large", "does not come"])
async def test_a_later_message_of_a_stream_of_small_ones_is_bounded_too(
    services: Services, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    monkeypatch.setattr(read_gate, "READ_TIMEOUT_S", 0.5)
    small = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()

    async def requests() -> AsyncIterator[bytes]:
        yield small
        if is_large:
            yield small + bytes(100_000)
        await asyncio.Event().wait()

    call = services.channel.stream_stream(REFLECTION)(requests())
    expected = grpc.StatusCode.INVALID_ARGUMENT if is_large else grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await end_of(call, num_responses=1)).code() == expected


async def test_whoever_watches_health_too_often_leaves_it_to_others(services: Services) -> None:
    own_connection = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(services.address, own_connection) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        calls = [watch(health_pb2.HealthCheckRequest()) for _ in range(MAX_SMALL_CALLS_PER_CONNECTION)]
        for call in calls:
            assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await end_of(watch(health_pb2.HealthCheckRequest()))).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await services.health_of("") == "SERVING"
        for call in calls:
            call.cancel()


async def test_one_connection_has_calls_for_the_whole_batch_however_few_may_wait() -> None:
    num_rows = 100
    async with Services(max_num_seqs=num_rows, max_num_waiting=1) as services:
        calls = [services.channel.stream_unary(TOKENIZE)(never()) for _ in range(num_rows + 20)]

        async def are_refused() -> bool:
            return sum(call.done() for call in calls) >= 20

        await wait_until(are_refused, "calls past the share are refused")
        await asyncio.sleep(0.2)
        refused = [call for call in calls if call.done()]
        assert len(refused) == 20
        assert {await call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for call in calls:
            call.cancel()
