"""The scaffolding that both services share: TLS, interceptors, ports, channelz."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from tandem.internal.v1 import worker_pb2, worker_pb2_grpc
from tandem_scheduler.engine.worker_client import GrpcWorkerClient
from tandem_scheduler.service import worker_credentials
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.errors import ConfigError, WorkerUnavailable
from tandem_shared.rpc.credentials import server_credentials
from tandem_shared.rpc.grpc_options import WORKER_CHANNEL_OPTIONS, WORKER_KEEPALIVE_TIME_MS
from tandem_shared.rpc.server import Server
from tandem_shared.settings_checks import check_tls
from tandem_worker.service.servicer import SERVICE_NAME, WorkerServicer
from tests.support.builders import worker_info
from tests.support.certificates import make_certificate
from tests.support.fake_worker import FakeRunner

STANDARD_SERVICES = (
    "grpc.channelz.v1.Channelz",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)


def make_server(**options: Any) -> Server:
    servicer = WorkerServicer(FakeRunner(worker_info()))
    return Server({SERVICE_NAME: lambda s: worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, s)}, **options)


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[int]:
    """Runs the server, and yields its port."""
    try:
        yield await server.start("127.0.0.1", 0)
    finally:
        await server.stop(0)


async def test_reflection_v1_is_what_its_published_proto_says() -> None:
    """As a client that knows nothing of v1alpha: with requests as bytes and a descriptor pool of its own."""
    list_services, symbol = b"\x3a\x00", b"grpc.reflection.v1.ServerReflection"
    file_containing_symbol = b"\x22" + bytes([len(symbol)]) + symbol
    async with running(make_server()) as port, grpc.aio.insecure_channel(f"localhost:{port}") as channel:
        call = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")(
            iter([file_containing_symbol, list_services])
        )
        described, listed = [reply async for reply in call]
    files = reflection_pb2.ServerReflectionResponse.FromString(described).file_descriptor_response.file_descriptor_proto
    assert len(files) == 1 and b"v1alpha" not in files[0]
    pool = DescriptorPool()
    pool.AddSerializedFile(files[0])
    fields = pool.FindMessageTypeByName("grpc.reflection.v1.ServerReflectionRequest").fields_by_name
    assert {name: field.number for name, field in fields.items()} == {
        "host": 1,
        "file_by_filename": 3,
        "file_containing_symbol": 4,
        "file_containing_extension": 5,
        "all_extension_numbers_of_type": 6,
        "list_services": 7,
    }
    reply = GetMessageClass(pool.FindMessageTypeByName("grpc.reflection.v1.ServerReflectionResponse"))
    names = {service.name for service in reply.FromString(listed).list_services_response.service}
    assert names == {SERVICE_NAME, *STANDARD_SERVICES}


async def test_a_server_that_finishes_waits_for_what_runs_and_answers_what_comes() -> None:
    """Unlike gRPC's own stop, which ends calls that arrive meanwhile CANCELLED."""
    may_answer = asyncio.Event()

    async def answer(request: bytes, context: Any) -> bytes:
        if request:
            await may_answer.wait()
        return b"answer"

    handlers = {"Answer": grpc.unary_unary_rpc_method_handler(answer)}
    server = Server({"a": lambda s: s.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("a", handlers)])})
    async with running(server) as port, grpc.aio.insecure_channel(f"localhost:{port}") as channel:
        call = channel.unary_unary("/a/Answer")
        waiting = asyncio.ensure_future(call(b"wait"))
        assert await call(b"", wait_for_ready=True) == b"answer"
        await server.finish(0.01)
        assert not waiting.done()
        finishing = asyncio.create_task(server.finish(60))
        assert await call(b"") == b"answer"
        assert not finishing.done()
        may_answer.set()
        await finishing
        assert waiting.done() and await waiting == b"answer"
        assert await call(b"") == b"answer"


async def ask(port: int, credentials: grpc.ChannelCredentials | None) -> str:
    address = f"localhost:{port}"
    channel = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
    async with channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        response = await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=10)
        return str(response.worker_instance_id)


async def test_with_a_certificate_only_tls_is_spoken(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    settings = WorkerSettings(tls_cert=str(certificate), tls_key=str(key))
    server = make_server(credentials=server_credentials(settings))
    async with running(server) as port:
        assert (
            await ask(port, grpc.ssl_channel_credentials(certificate.read_bytes())) == worker_info().worker_instance_id
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(port, None)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_with_a_client_authority_a_client_must_show_its_certificate(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    client_certificate, client_key = make_certificate(tmp_path, "client")
    settings = WorkerSettings(tls_cert=str(certificate), tls_key=str(key), tls_client_ca=str(client_certificate))
    server = make_server(credentials=server_credentials(settings))
    async with running(server) as port:
        pair = (client_key.read_bytes(), client_certificate.read_bytes())
        known = grpc.ssl_channel_credentials(certificate.read_bytes(), *pair)
        assert await ask(port, known) == worker_info().worker_instance_id
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(port, grpc.ssl_channel_credentials(certificate.read_bytes()))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_scheduler_shows_its_certificate_to_such_a_worker(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "worker")
    shown, shown_key = make_certificate(tmp_path, "scheduler")
    server = make_server(
        credentials=server_credentials(
            WorkerSettings(tls_cert=str(certificate), tls_key=str(key), tls_client_ca=str(shown))
        )
    )
    async with running(server) as port:
        settings = SchedulerSettings(worker_address=f"localhost:{port}", worker_ca=str(certificate))
        with_certificate = replace(settings, worker_tls_cert=str(shown), worker_tls_key=str(shown_key))
        client = GrpcWorkerClient(settings.worker_address, worker_credentials(with_certificate))
        info = await client.get_info(10)
        session = await client.open_session(info, "a", 1, 0)
        await session.close()
        await client.close()
        without = GrpcWorkerClient(settings.worker_address, worker_credentials(settings))
        with pytest.raises(WorkerUnavailable):
            await without.get_info(1)
        await without.close()


async def test_a_server_reads_certificates_again_that_have_changed(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "old")
    old = grpc.ssl_channel_credentials(certificate.read_bytes())
    next_certificate, next_key = make_certificate(tmp_path, "next")
    new = grpc.ssl_channel_credentials(next_certificate.read_bytes())
    settings = WorkerSettings(tls_cert=str(certificate), tls_key=str(key))
    async with running(make_server(credentials=server_credentials(settings))) as port:
        assert await ask(port, old)
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(port, new)
        certificate.write_text("not a certificate")
        assert await ask(port, old)
        next_key.replace(key)
        next_certificate.replace(certificate)
        assert await ask(port, new)
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(port, old)


async def test_a_scheduler_reads_its_certificate_again_when_it_looks_for_its_worker(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "worker")
    shown, shown_key = make_certificate(tmp_path, "scheduler")
    next_shown, next_key = make_certificate(tmp_path, "next")
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes(next_shown.read_bytes())
    server = make_server(
        credentials=server_credentials(
            WorkerSettings(tls_cert=str(certificate), tls_key=str(key), tls_client_ca=str(authorities))
        )
    )
    async with running(server) as port:
        address = f"localhost:{port}"
        settings = SchedulerSettings(
            worker_ca=str(certificate), worker_tls_cert=str(shown), worker_tls_key=str(shown_key)
        )
        client = GrpcWorkerClient(address, worker_credentials(settings))
        with pytest.raises(WorkerUnavailable):
            await client.get_info(1)
        next_key.replace(shown_key)
        next_shown.replace(shown)
        assert (await client.get_info(10)).worker_instance_id == worker_info().worker_instance_id
        await client.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"worker_tls_cert": "c.pem"},
        {"worker_tls_key": "k.pem"},
        {"worker_tls_cert": "c.pem", "worker_tls_key": "k.pem"},
    ],
)
def test_the_schedulers_certificate_is_named_whole(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--worker-tls-cert"):
        check_tls(SchedulerSettings(**settings))


def test_a_certificate_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--tls-key: .*no-key\.pem"):
        server_credentials(WorkerSettings(tls_cert="no-cert.pem", tls_key="no-key.pem"))


async def test_a_port_in_use_is_an_error() -> None:
    first, second = make_server(), make_server()
    async with running(first) as port:
        with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1:{port}"):
            await second.start("127.0.0.1", port)


class Refuse(grpc.aio.ServerInterceptor):
    """Refuses every call, as an authenticating interceptor refuses a caller that it doesn't know."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        async def refuse(request: Any, context: Any) -> Any:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

        if ("token", "secret") in handler_call_details.invocation_metadata:
            return await continuation(handler_call_details)
        return grpc.unary_unary_rpc_method_handler(refuse)


async def test_interceptors_see_every_call() -> None:
    server = make_server(interceptors=[Refuse()])
    async with running(server) as port:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(port, None)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            response = await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), metadata=(("token", "secret"),))
            assert response.worker_instance_id


async def test_channelz_counts_calls() -> None:
    server = make_server()
    async with running(server) as port:
        await ask(port, None)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            servers = await channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest())
        assert sum(each.data.calls_started for each in servers.server) >= 1


@pytest.mark.slow
async def test_an_idle_channel_survives_its_keepalive_pings() -> None:
    """A server that finds pings too frequent sends GOAWAY."""
    pings_s = 3.5 * WORKER_KEEPALIVE_TIME_MS / 1000
    async with (
        running(make_server()) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", WORKER_CHANNEL_OPTIONS) as channel,
    ):
        await channel.channel_ready()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(channel.wait_for_state_change(grpc.ChannelConnectivity.READY), pings_s)
