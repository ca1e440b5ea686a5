"""Who may call what: every RPC that a server has, with no key, a wrong one, one of the wrong kind, an expired
certificate, and the right ones. The RPCs are those that reflection lists, so a new one is tested by itself: it needs a
key for control unless OPEN or INFERENCE says otherwise.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2, status_pb2
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from smg_grpc_proto import vllm_engine_pb2

from tandem.internal.v1 import worker_pb2
from tandem.v1 import control_pb2, inference_pb2
from tandem_shared.config import WorkerSettings
from tandem_shared.rpc import reflection
from tandem_shared.rpc.credentials import server_credentials
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tandem_shared.rpc.rich_status import DETAILS_METADATA_KEY
from tandem_shared.rpc.server import Server
from tandem_shared.rpc.session_secret import SECRET_METADATA_KEY, SecretInterceptor
from tandem_worker.service.servicer import SERVICE_NAME, WorkerServicer
from tests.contract.services import WAIT_S, Services
from tests.support.builders import worker_info
from tests.support.certificates import make_certificate
from tests.support.fake_worker import FakeRunner

pytestmark = pytest.mark.asyncio(loop_scope="module")

SHARED_FILES = (health_pb2, channelz_pb2, reflection_pb2, reflection)
SCHEDULER_FILES = (inference_pb2, control_pb2, vllm_engine_pb2, *SHARED_FILES)
WORKER_FILES = (worker_pb2, *SHARED_FILES)

OPEN = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/vllm.grpc.engine.VllmEngine/HealthCheck"}
INFERENCE = {
    *(
        f"/tandem.v1.InferenceService/{rpc.name}"
        for rpc in inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods
    ),
    *(f"/vllm.grpc.engine.VllmEngine/{name}" for name in ("Generate", "GetModelInfo", "GetTokenizer")),
    *(f"/{name}/ServerReflectionInfo" for name in reflection.SERVICE_NAMES),
}

KEYS = {"inference": "key-for-inference-0001", "control": "key-for-control-000002"}
KEY_FILE = f"alice inference {KEYS['inference']}\n\n# comment\nops control {KEYS['control']}\n"
SECRET = b"the secret of a session"
Metadata = tuple[tuple[str, str | bytes], ...]


def rpcs_of(files: tuple[Any, ...]) -> list[str]:
    """The paths of the RPCs that the files describe."""
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return [f"/{service.full_name}/{rpc.name}" for service in services for rpc in service.methods]


def bearer(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


def needs(rpc: str) -> str | None:
    return None if rpc in OPEN else "inference" if rpc in INFERENCE else "control"


@dataclass
class Site:
    """A server, and a channel for each certificate that a client may show."""

    channels: dict[str, grpc.Channel]
    """Not asyncio's: those forget the status of a stream that ends before its request is sent."""

    async def call(self, rpc: str, metadata: Metadata, certificate: str = "right") -> grpc.StatusCode:
        """The status of a call with an empty request. A stream ends with its first message."""
        return await asyncio.to_thread(self._call, rpc, metadata, certificate)

    def _call(self, rpc: str, metadata: Metadata, certificate: str) -> grpc.StatusCode:
        call = self.channels[certificate].stream_stream(rpc)(iter([b""]), metadata=metadata, timeout=WAIT_S)
        try:
            next(call, None)
            return grpc.StatusCode.OK
        except grpc.RpcError as error:
            self.error: Any = error
            return self.error.code()
        finally:
            call.cancel()

    def reason(self) -> str:
        """The reason of the last error."""
        info = error_details_pb2.ErrorInfo()
        [data] = [value for key, value in self.error.trailing_metadata() if key == DETAILS_METADATA_KEY]
        assert any(detail.Unpack(info) for detail in status_pb2.Status.FromString(data).details)
        return str(info.reason)


class Certificates:
    """Those of a server and of clients, of which the server knows the authorities."""

    def __init__(self, folder: Path) -> None:
        self.server, self.server_key = make_certificate(folder, "server")
        self._clients = {
            "right": make_certificate(folder, "right"),
            "expired": make_certificate(folder, "expired", is_expired=True),
            "unknown": make_certificate(folder, "unknown"),
        }
        self.client_ca = folder / "clients.pem"
        self.client_ca.write_bytes(b"".join(self._clients[name][0].read_bytes() for name in ("right", "expired")))

    def settings(self) -> dict[str, str]:
        """Of the server."""
        return {"tls_cert": str(self.server), "tls_key": str(self.server_key), "tls_client_ca": str(self.client_ca)}

    def credentials(self, name: str) -> grpc.ChannelCredentials:
        authority = self.server.read_bytes()
        if name == "none":
            return grpc.ssl_channel_credentials(authority)
        certificate, key = self._clients[name]
        return grpc.ssl_channel_credentials(authority, key.read_bytes(), certificate.read_bytes())

    @asynccontextmanager
    async def site(self, address: str) -> AsyncIterator[Site]:
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        names = ("right", "expired", "unknown", "none")
        site = Site({name: grpc.secure_channel(address, self.credentials(name), options) for name in names})
        yield site
        for channel in site.channels.values():
            channel.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[0, 1], ids=["one-process", "front-end"])
async def scheduler(
    request: pytest.FixtureRequest, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    """A scheduler service with keys and certificates, which serves clients itself or by a front-end process."""
    key_file = tmp_path_factory.mktemp("keys") / "keys"
    key_file.write_text(KEY_FILE)
    services = Services(
        credentials=certificates.credentials("right"),
        api_server_count=request.param,
        api_key_file=str(key_file),
        vllm_engine_service=True,
        **certificates.settings(),
    )
    async with services, certificates.site(services.address) as site:
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(certificates: Certificates) -> AsyncIterator[Site]:
    servicer = WorkerServicer(FakeRunner(worker_info()))
    server = Server(
        {SERVICE_NAME: servicer.add_to},
        interceptors=[SecretInterceptor(SECRET)],
        credentials=server_credentials(WorkerSettings(**certificates.settings())),
    )
    port = await server.start("127.0.0.1", 0)
    async with certificates.site(f"localhost:{port}") as site:
        yield site
    await server.stop(0)


async def listed(site: Site, metadata: Metadata) -> set[str]:
    """The names of the services that the server lists."""
    call = site.channels["right"].stream_stream(
        f"/{reflection.SERVICE_NAMES[0]}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata)
    [reply] = await asyncio.to_thread(list, call)
    return {service.name for service in reply.list_services_response.service}


async def test_the_matrix_has_every_service_that_the_servers_list(scheduler: Site, worker: Site) -> None:
    for site, metadata, files in (
        (scheduler, bearer(KEYS["inference"]), SCHEDULER_FILES),
        (worker, ((SECRET_METADATA_KEY, SECRET),), WORKER_FILES),
    ):
        found = [descriptor_pool.Default().FindServiceByName(name) for name in await listed(site, metadata)]
        rpcs = {f"/{service.full_name}/{rpc.name}" for service in found for rpc in service.methods}
        assert rpcs == set(rpcs_of(files))
    assert set(rpcs_of(SCHEDULER_FILES)) >= OPEN | INFERENCE


@pytest.mark.parametrize("shown", ["none", "wrong", "malformed", "twice", "wrong kind", "expired", "unknown", "right"])
@pytest.mark.parametrize("rpc", rpcs_of(SCHEDULER_FILES))
async def test_the_scheduler(scheduler: Site, rpc: str, shown: str) -> None:
    scope = needs(rpc) or "control"
    right = bearer(KEYS[scope])
    if shown in ("expired", "unknown"):
        assert await scheduler.call(rpc, right, certificate=shown) == grpc.StatusCode.UNAVAILABLE
        return
    metadata = {
        "none": (),
        "wrong": bearer(KEYS[scope][:-1] + "x"),
        "malformed": (("authorization", KEYS[scope]),),
        "twice": right + right,
        "wrong kind": bearer(KEYS["control" if scope == "inference" else "inference"]),
        "right": right,
    }[shown]
    status = await scheduler.call(rpc, metadata)
    if shown == "right" or needs(rpc) is None:
        assert status not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
    elif shown == "wrong kind":
        assert (status, scheduler.reason()) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    else:
        assert (status, scheduler.reason()) == (grpc.StatusCode.UNAUTHENTICATED, "INVALID_API_KEY")


@pytest.mark.parametrize("shown", ["none", "wrong", "wrong kind", "expired", "unknown", "right"])
@pytest.mark.parametrize("rpc", rpcs_of(WORKER_FILES))
async def test_the_worker(worker: Site, rpc: str, shown: str) -> None:
    """The wrong kind is the secret in the place of an API key."""
    right: Metadata = ((SECRET_METADATA_KEY, SECRET),)
    if shown in ("expired", "unknown"):
        assert await worker.call(rpc, right, certificate=shown) == grpc.StatusCode.UNAVAILABLE
        return
    metadata = {
        "none": (),
        "wrong": ((SECRET_METADATA_KEY, SECRET[:-1]),),
        "wrong kind": bearer(SECRET.decode().replace(" ", "-")),
        "right": right,
    }[shown]
    status = await worker.call(rpc, metadata)
    if shown == "right" or rpc in OPEN:
        assert status != grpc.StatusCode.UNAUTHENTICATED
    else:
        assert (status, worker.reason()) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")


async def test_without_a_certificate_nothing_is_answered(scheduler: Site, worker: Site) -> None:
    for site in (scheduler, worker):
        assert await site.call("/grpc.health.v1.Health/Check", (), certificate="none") == grpc.StatusCode.UNAVAILABLE
