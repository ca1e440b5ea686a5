"""What API keys do beyond letting a caller in: who is logged, whose prefixes are shared, priorities, files that change;
and what a server without keys leaves open.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.v1 import control_pb2
from tandem_scheduler.control import audit
from tandem_shared.host.log import configure_logging
from tests.contract.front_ends import connections_to_each
from tests.contract.services import INFERENCE, Services, error_of, model_info, stream_request, true_tokens, wait_until
from tests.contract.test_authorization import bearer
from tests.e2e.services import free_port
from tests.support.certificates import make_certificate
from tests.support.fake_worker import FakeRunner

ALICE, BOB, OPS = "alices-key-00000001", "bobs-key-0000000002", "operators-key-000003"
LINES = f"alice inference {ALICE} priority=0..5\nbob inference {BOB}\nops control {OPS}\n"
FORBIDDEN, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(LINES)
    return path


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    configure_logging("debug")
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


async def generate(services: Any, key: str, **fields: Any) -> Any:
    request = stream_request(**{"prompt": [3] * 64, "max_tokens": 2, **fields})
    return [message async for message in services.inference.GenerateStream(request, metadata=bearer(key))]


async def num_cached(services: Any, key: str, **fields: Any) -> int:
    messages = await generate(services, key, **fields)
    return int(messages[-1].usage.num_cached_tokens)


async def test_a_prefix_is_shared_within_a_key_alone(key_file: Path) -> None:
    asked = ((ALICE, ""), (BOB, ""), (ALICE, ""), (ALICE, "x"), (BOB, "x"), (ALICE, "x"), (BOB, ""))
    runner = FakeRunner(model_info(), salt_of=lambda sequence_id: str(asked[sequence_id]))
    async with Services(runner, api_key_file=str(key_file)) as services:
        found = [await num_cached(services, key, cache_salt=salt) for key, salt in asked]
    assert found == [0, 0, 64, 0, 0, 64, 64]


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _literal(text: bytes) -> bytes:
    """A string of HPACK, of less than 127 bytes."""
    return bytes([len(text)]) + text


async def test_a_key_that_is_no_text_is_refused_and_not_logged(
    key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """gRPC's own client sends no such bytes, so this speaks HTTP/2."""
    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/tandem.v1.InferenceService/GetModelInfo",
        b":authority": b"x",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
        b"authorization": b"Bearer " + ALICE.encode() + b"\xff",
    }
    block = b"".join(b"\0" + _literal(name) + _literal(value) for name, value in headers.items())
    with log_to_stderr():
        async with Services(api_key_file=str(key_file)) as services:
            host, _, port = services.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"") + _frame(1, 5, 1, block))
            kind = None
            while kind != 1:
                start = await reader.readexactly(9)
                kind = start[3]
                payload = await reader.readexactly(int.from_bytes(start[:3]))
            writer.close()
            assert b"the API key is not known" in payload
    assert ALICE not in capsys.readouterr().err


async def test_a_key_says_which_priorities_its_requests_may_have(key_file: Path) -> None:
    async with Services(api_key_file=str(key_file)) as services:
        for key, priority, is_allowed in ((ALICE, 5, True), (ALICE, 6, False), (ALICE, -1, False), (BOB, 1, False)):
            call = generate(services, key, priority=priority)
            if is_allowed:
                assert await call
            else:
                error = await error_of(call)
                assert error.code() == FORBIDDEN and "priority" in str(error.details())


@pytest.mark.parametrize(("allowed", "given"), [("-3..10", 0), ("5..9", 5), ("-9..-5", -5), ("7..7", 7)])
async def test_a_request_without_a_priority_has_the_nearest_to_0_that_its_key_allows(
    key_file: Path, allowed: str, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file.write_text(f"alice inference {ALICE} priority={allowed}\n")
    async with Services(api_key_file=str(key_file)) as services:
        step_loop, taken = services.service._hub.step_loop, []
        submit = step_loop.submit

        def noted(requests: Any) -> None:
            taken.extend(request.priority for request in requests)
            submit(requests)

        monkeypatch.setattr(step_loop, "submit", noted)
        assert await generate(services, ALICE) and taken == [given]
        if given:
            assert (await error_of(generate(services, ALICE, priority=0))).code() == FORBIDDEN


@pytest.mark.parametrize("api_server_count", [0, 2])
async def test_a_changed_file_of_keys_holds_for_the_next_call(key_file: Path, api_server_count: int) -> None:
    new = key_file.with_name("new")
    new.write_text(LINES.replace(ALICE, ALICE + "-new"))
    async with Services(api_key_file=str(key_file), api_server_count=api_server_count) as services:
        assert await generate(services, ALICE)
        new.replace(key_file)
        assert (await error_of(generate(services, ALICE))).code() == UNKNOWN
        assert await generate(services, ALICE + "-new")
        if api_server_count:
            async with connections_to_each(services.address) as each:
                for connection in each:
                    assert (await error_of(generate(connection, ALICE))).code() == UNKNOWN
                    assert await generate(connection, ALICE + "-new")


async def test_who_changed_the_server_is_logged_as_a_warning(key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Semaphore(0)
    async with Services(FakeRunner(model_info(), gate=gate), api_key_file=str(key_file)) as services:
        control, metadata = services.control, bearer(OPS)
        running = asyncio.create_task(generate(services, ALICE, request_id="long", max_tokens=1000))

        async def runs() -> bool:
            load = await control.GetLoad(control_pb2.GetLoadRequest(), metadata=metadata)
            return bool(load.num_running_sequences)

        await wait_until(runs, "it runs")
        await control.Abort(control_pb2.AbortRequest(request_id="long"), metadata=metadata)
        gate.release(1000)
        await running
        await error_of(control.Abort(control_pb2.AbortRequest(request_id="gone"), metadata=metadata))
        await control.ResetPrefixCache(control_pb2.ResetPrefixCacheRequest(), metadata=metadata)
        await control.Drain(control_pb2.DrainRequest(), metadata=metadata)
        await error_of(control.Undrain(control_pb2.UndrainRequest(), metadata=bearer(ALICE)))
        await control.Undrain(control_pb2.UndrainRequest(), metadata=metadata)
    records = [record for record in caplog.records if record.name == audit.__name__]
    starts = ["Abort of 'long'", "ResetPrefixCache", "Drain", "Undrain"]
    assert [record.levelno for record in records] == [logging.WARNING] * 4
    for record, start in zip(records, starts, strict=True):
        assert record.getMessage().startswith(f"{start} by the key ops, ipv4:127.0.0.1:")
    assert not any(key in caplog.text for key in (ALICE, BOB, OPS))


async def test_what_is_refused_is_not_done(key_file: Path) -> None:
    async with Services(api_key_file=str(key_file)) as services:
        for metadata, status in ((None, UNKNOWN), (bearer(ALICE), FORBIDDEN)):
            error = await error_of(services.control.Drain(control_pb2.DrainRequest(), metadata=metadata))
            assert error.code() == status
            assert await services.health_of(INFERENCE) == "SERVING"


async def test_a_drained_server_takes_requests_again() -> None:
    gate = threading.Semaphore(0)
    async with Services(FakeRunner(model_info(), gate=gate)) as services:
        await services.control.Undrain(control_pb2.UndrainRequest())
        running = asyncio.create_task(services.stream(stream_request()))
        await services.wait_load(lambda load: load.num_running_sequences == 1, "one runs")
        draining = asyncio.create_task(services.drain())
        await services.wait_health("NOT_SERVING")
        await services.control.Undrain(control_pb2.UndrainRequest())
        error = await error_of(draining)
        assert error.code() == grpc.StatusCode.ABORTED
        await services.wait_health("SERVING")
        gate.release(1000)
        assert (await services.stream(stream_request())).token_ids == true_tokens(stream_request())
        assert (await running).token_ids == true_tokens(stream_request())
        await services.drain()
        await services.wait_health("NOT_SERVING")


async def test_a_server_that_stops_can_not_be_undrained() -> None:
    gate = threading.Semaphore(0)
    services = Services(FakeRunner(model_info(), gate=gate))
    await services.start()
    running = asyncio.create_task(services.stream(stream_request()))
    await services.wait_load(lambda load: load.num_running_sequences == 1, "one runs")
    stopping = asyncio.create_task(services.service.stop(grace_s=30))
    await services.wait_health("NOT_SERVING")
    error = await error_of(services.control.Undrain(control_pb2.UndrainRequest()))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    gate.release(1000)
    assert (await running).token_ids == true_tokens(stream_request())
    await stopping
    await services.stop()


@pytest.mark.parametrize("is_insecure", [False, True])
async def test_without_keys_a_server_that_others_reach_is_controlled_by_nobody_unless_told_so(
    tmp_path: Path, is_insecure: bool
) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    settings = {"tls_cert": str(certificate), "tls_key": str(key), "insecure": is_insecure}
    async with Services(credentials=credentials, host="0.0.0.0", **settings) as services:
        assert (await services.stream(stream_request())).token_ids == true_tokens(stream_request())
        drain = services.control.Drain(control_pb2.DrainRequest())
        if is_insecure:
            await drain
        else:
            error = await error_of(drain)
            assert error.code() == FORBIDDEN and "--api-key-file" in str(error.details())


@pytest.mark.parametrize("api_server_count", [0, 2])
async def test_the_health_port_needs_neither_key_nor_certificate(
    key_file: Path, tmp_path: Path, api_server_count: int
) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    port = free_port()
    services = Services(
        credentials=grpc.ssl_channel_credentials(certificate.read_bytes()),
        api_server_count=api_server_count,
        api_key_file=str(key_file),
        health_port=port,
        tls_cert=str(certificate),
        tls_key=str(key),
    )
    async with services, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=INFERENCE)

        async def is_serving() -> bool:
            return bool((await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING)

        await wait_until(is_serving, "the health port says SERVING")
        await services.stop_worker()

        async def is_not_serving() -> bool:
            return not await is_serving()

        await wait_until(is_not_serving, "the health port says NOT_SERVING")
        other = channel.unary_unary("/tandem.v1.ControlService/Drain")
        assert (await error_of(other(b""))).code() == grpc.StatusCode.UNIMPLEMENTED
