"""Connections that try to use up memory, file descriptors or places. The frames of HTTP/2 are made by hand."""

import asyncio
import contextlib
import gc
import resource
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import grpc
import psutil
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from tandem.v1 import inference_pb2
from tandem_shared.rpc import grpc_options
from tandem_shared.rpc.server import RESERVED_DESCRIPTORS
from tests.contract.services import HOST, WAIT_S, Services, stream_request, wait_until

MAX_REQUEST_BYTES = 100_000
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CLOSED_WITHIN_S = (grpc_options.KEEPALIVE_TIME_MS + grpc_options.KEEPALIVE_TIMEOUT_MS) / 2000
"""Well before unanswered pings would close the connection."""

NUM_PINGS = 300_000
NUM_RESETS = 50_000
MIB = 2**20


@pytest_asyncio.fixture
async def services() -> AsyncIterator[Services]:
    async with Services(max_request_bytes=MAX_REQUEST_BYTES) as services:
        yield services


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


SETTINGS, PING = frame(4), frame(6, b"12345678")


async def test_a_compressed_request_is_refused_unread(services: Services) -> None:
    """gRPC inflates a message before it checks its size, and this one would become 1000 times as long."""
    request = stream_request("x" * 10_000_000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in services.inference.GenerateStream(request, compression=grpc.Compression.Gzip):
            pass
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "ompress" in (caught.value.details() or "")
    assert await services.health_of("") == "SERVING"


async def test_a_request_above_the_limit_is_refused_with_both_sizes(services: Services) -> None:
    request = inference_pb2.TokenizeRequest(text="x" * MAX_REQUEST_BYTES)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.inference.Tokenize(request)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"larger than max ({request.ByteSize()} vs. {MAX_REQUEST_BYTES})" in (caught.value.details() or "")
    fits = inference_pb2.TokenizeRequest(text="x" * (MAX_REQUEST_BYTES - 10))
    assert len((await services.inference.Tokenize(fits)).token_ids) > 0


async def test_a_call_that_ends_before_its_request_is_refused(services: Services) -> None:
    call = services.channel.stream_unary("/tandem.v1.InferenceService/Tokenize")(iter(()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "request_class", [inference_pb2.GenerateRequest, inference_pb2.GenerateStreamRequest, inference_pb2.TokenizeRequest]
)
async def test_a_refused_request_is_freed_at_once(services: Services, request_class: type[Message]) -> None:
    """It is freed at once, not only when the garbage collector runs, which may be much later."""
    method = request_class.__name__.removesuffix("Request")
    call = services.channel.unary_stream(f"/tandem.v1.InferenceService/{method}", request_class.SerializeToString)

    async def refused() -> None:
        with pytest.raises(grpc.aio.AioRpcError, match="not served here"):
            async for _ in call(request_class(model="another")):
                pass

    def num_alive() -> int:
        return sum(isinstance(each, request_class) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = num_alive()
        for _ in range(5):
            await refused()

        async def are_gone() -> bool:
            return num_alive() <= before

        await wait_until(are_gone, "the requests are gone")
    finally:
        gc.enable()


@pytest.mark.parametrize("preface", [b"", PREFACE[:10], PREFACE], ids=["nothing", "half a preface", "no settings"])
async def test_a_connection_that_does_not_speak_is_closed(monkeypatch: pytest.MonkeyPatch, preface: bytes) -> None:
    monkeypatch.setattr(grpc_options, "HANDSHAKE_TIMEOUT_MS", 300)
    async with Services() as services:
        reader, writer = await asyncio.open_connection(HOST, int(services.address.rpartition(":")[2]))
        writer.write(preface)
        await asyncio.wait_for(_end_of(reader), CLOSED_WITHIN_S)
        writer.close()


async def test_a_connection_without_calls_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_options, "IDLE_TIMEOUT_MS", 300)
    async with Services() as services:
        reader, writer = await asyncio.open_connection(HOST, int(services.address.rpartition(":")[2]))
        writer.write(PREFACE + SETTINGS)
        await asyncio.wait_for(_end_of(reader), CLOSED_WITHIN_S)
        writer.close()
        # A client's own connection was closed too; it opens another.
        assert await services.health_of("") == "SERVING"


async def _end_of(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(65536):
            pass
    except ConnectionResetError:
        pass


@contextmanager
def descriptor_limit(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


OPEN_SOCKETS = """
import resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
sockets = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(int(sys.argv[2]))]
print("open", flush=True)
sys.stdin.read()
"""


async def test_idle_sockets_leave_descriptors_to_the_worker_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more idle sockets than the process may have descriptors, a restarted worker is still found."""
    limit = psutil.Process().num_fds() + 2 * RESERVED_DESCRIPTORS
    monkeypatch.setattr("tandem_shared.rpc.server.raise_descriptor_limit", lambda: limit)
    # The sockets stay open.
    monkeypatch.setattr(grpc_options, "HANDSHAKE_TIMEOUT_MS", 1000 * 2 * round(WAIT_S))
    async with Services() as services:
        command = [sys.executable, "-c", OPEN_SOCKETS, services.address.rpartition(":")[2], str(limit + 50)]
        with (
            descriptor_limit(limit),
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as strangers,
        ):
            assert strangers.stdout is not None and strangers.stdin is not None
            assert await asyncio.to_thread(strangers.stdout.readline) == b"open\n"
            await services.stop_worker()
            await services.wait_health("NOT_SERVING")
            await services.start_worker()
            await services.wait_health("SERVING")
            assert psutil.Process().num_fds() < limit - RESERVED_DESCRIPTORS / 2
            strangers.stdin.close()


@pytest.mark.parametrize("reads", [True, False], ids=["that reads", "that does not read"])
async def test_a_flood_of_pings_takes_no_memory(services: Services, reads: bool) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    reader, writer = await asyncio.open_connection(HOST, int(services.address.rpartition(":")[2]))
    reading = asyncio.create_task(reader.readexactly(NUM_PINGS * len(PING))) if reads else None
    writer.write(PREFACE + SETTINGS)
    for _ in range(NUM_PINGS // 1000):
        writer.write(PING * 1000)
        # A server that waits for its answers to be read takes no more.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(writer.drain(), WAIT_S if reads else 0.01)
    if reading is not None:
        await asyncio.wait_for(reading, WAIT_S)
    assert await services.health_of("") == "SERVING"
    # What this process has not sent yet is its own.
    grown = process.memory_info().rss - before - writer.transport.get_write_buffer_size()
    writer.transport.abort()
    assert grown < 100 * MIB, f"{grown / MIB:.0f} MiB"


async def test_calls_opened_and_reset_at_once_are_kept_in_bounds(services: Services) -> None:
    """A connection that opens and resets calls can open as many as it likes; gRPC keeps 8,192 of them at a time."""
    names = {":method": "POST", ":scheme": "http", ":path": "/grpc.health.v1.Health/Check", ":authority": "x"}
    headers = b"".join(
        bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in (names | {"content-type": "application/grpc", "te": "trailers"}).items()
    )
    cancel = struct.pack(">I", 8)
    process = psutil.Process()
    before = process.memory_info().rss
    reader, writer = await asyncio.open_connection(HOST, int(services.address.rpartition(":")[2]))
    reading = asyncio.create_task(_end_of(reader))
    writer.write(PREFACE + SETTINGS)
    for number in range(1, 2 * NUM_RESETS, 2):
        writer.write(frame(1, headers, flags=4, stream=number) + frame(3, cancel, stream=number))
        await writer.drain()
    grown = process.memory_info().rss - before
    writer.transport.abort()
    await reading
    assert grown < 250 * MIB, f"{grown / MIB:.0f} MiB"
