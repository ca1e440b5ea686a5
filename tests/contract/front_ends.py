"""Helpers for tests of front-end processes: which process a connection landed in, and what the system says of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tandem_scheduler.processes.engine_side.front_end_pool import MODULE
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tests.contract.gated_worker import gated_runner
from tests.contract.services import HOST, INFERENCE, Services, StreamedOutput, read_stream, stream_request, wait_until

MAX_CONNECTIONS = 64


@dataclass
class Connection:
    """A connection of its own, and the front-end process that took it."""

    channel: grpc.aio.Channel
    process: psutil.Process

    def __post_init__(self) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.control = control_pb2_grpc.ControlServiceStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    async def generate(self, request: inference_pb2.GenerateStreamRequest) -> inference_pb2.GenerateResponse:
        unary = inference_pb2.GenerateRequest.FromString(request.SerializeToString())
        response: inference_pb2.GenerateResponse = await self.inference.Generate(unary)
        return response

    async def stream(self, request: inference_pb2.GenerateStreamRequest) -> StreamedOutput:
        return await read_stream(self.inference.GenerateStream(request))

    async def load(self) -> control_pb2.GetLoadResponse:
        response: control_pb2.GetLoadResponse = await self.control.GetLoad(control_pb2.GetLoadRequest())
        return response

    async def health_of(self, service: str) -> str:
        response = await self._health.Check(health_pb2.HealthCheckRequest(service=service))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    async def wait_health(self, status: str) -> None:
        async def has_status() -> bool:
            return await self.health_of(INFERENCE) == status

        await wait_until(has_status, f"health {status}")


def front_end_processes(parent: psutil.Process | None = None) -> list[psutil.Process]:
    """The front ends among the children of a process, this one by default, without zombies."""
    found = []
    for child in (parent or psutil.Process()).children():
        try:
            if MODULE in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def client_ports(process: psutil.Process, server_port: int, *, is_server: bool) -> set[int]:
    """The client ports of a process's connections to a server's port. The process is the server or the client."""
    ports = set()
    for connection in process.net_connections("tcp"):
        if connection.status == psutil.CONN_ESTABLISHED:
            server, client = connection.laddr, connection.raddr
            if not is_server:
                server, client = client, server
            if server.port == server_port:
                ports.add(client.port)
    return ports


async def connect(address: str, parent: psutil.Process | None = None) -> Connection:
    """Opens one more connection. The kernel chooses the front end that gets it."""
    port = int(address.rpartition(":")[2])
    before = client_ports(psutil.Process(), port, is_server=False)
    channel = grpc.aio.insecure_channel(address, [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)])
    await asyncio.wait_for(channel.channel_ready(), 10)
    # A front end may still list connections that have just been closed, so this looks for the new one.
    new = client_ports(psutil.Process(), port, is_server=False) - before
    [owner] = [each for each in front_end_processes(parent) if client_ports(each, port, is_server=True) & new]
    return Connection(channel, owner)


@asynccontextmanager
async def connections_to_each(
    address: str, count: int = 2, parent: psutil.Process | None = None
) -> AsyncIterator[list[Connection]]:
    """A connection to each front end."""
    async with AsyncExitStack() as stack:
        found: dict[int, Connection] = {}
        for _ in range(MAX_CONNECTIONS):
            connection = await connect(address, parent)
            stack.push_async_callback(connection.channel.close)
            found.setdefault(connection.process.pid, connection)
            if len(found) == count:
                break
        assert len(found) == count, f"{MAX_CONNECTIONS} connections reached {len(found)} front ends of {count}"
        for connection in found.values():
            await connection.wait_health("SERVING")
        yield list(found.values())


@asynccontextmanager
async def two_front_ends(services: Services) -> AsyncIterator[tuple[Connection, Connection]]:
    """Started services, which have two front-end processes, and a connection to each. None is left afterwards."""
    async with services, connections_to_each(f"{HOST}:{services.address.rpartition(':')[2]}") as (first, second):
        yield first, second
    assert front_end_processes() == []


def gated_services(**settings: Any) -> Services:
    """Two front ends, and a worker that gives no result until its gate is opened."""
    return Services(gated_runner(0), api_server_count=2, **settings)


@asynccontextmanager
async def running_on(
    services: Services, connection: Connection, request: inference_pb2.GenerateStreamRequest
) -> AsyncIterator["asyncio.Task[Any]"]:
    """Starts the request's stream and waits until it runs."""
    before = (await services.load()).num_running_sequences
    task = asyncio.create_task(connection.stream(request))
    await services.wait_load(lambda load: load.num_running_sequences > before, "it runs")
    yield task
    await asyncio.gather(task, return_exceptions=True)


async def reach_a_third(services: Services, known: list[Connection]) -> bool:
    """Whether one more connection lands in another front end and is served there."""
    connection = await connect(services.address)
    async with connection.channel:
        if connection.process in [each.process for each in known]:
            return False
        await connection.wait_health("SERVING")
        return (await connection.generate(stream_request())).usage.num_output_tokens == 8
