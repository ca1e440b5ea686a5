"""A worker whose name leads elsewhere after a restart, as a pod's does, or nowhere for a while."""

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem_scheduler.engine.worker_client import GrpcWorkerClient
from tandem_shared.errors import WorkerUnavailable
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tandem_shared.rpc.server import Server
from tandem_shared.step_plan import WorkerInfo
from tandem_worker.service.servicer import SERVICE_NAME, WorkerServicer
from tests.contract.worker_service import WAIT_S
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner
from tests.support.name_server import NameServer

FIRST_ADDRESS, SECOND_ADDRESS = "127.0.0.2", "127.0.0.3"
TRY_S = 0.5
NUM_TRIES = 6


@pytest.fixture
def names() -> Iterator[NameServer]:
    with NameServer() as server:
        yield server


@contextlib.asynccontextmanager
async def worker_at(address: str, port: int = 0) -> AsyncIterator[int]:
    """Gives the port."""
    server = Server({SERVICE_NAME: WorkerServicer(FakeRunner(worker_info())).add_to})
    try:
        yield await server.start(address, port)
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def client_of(target: str) -> AsyncIterator[GrpcWorkerClient]:
    client = GrpcWorkerClient(target)
    try:
        yield client
    finally:
        await client.close()


async def find(client: GrpcWorkerClient) -> WorkerInfo:
    """Tries as the step loop does."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return await client.get_info(TRY_S)
        except WorkerUnavailable:
            assert time.monotonic() < deadline, "the worker was not found"


async def test_a_worker_is_found_at_another_address(names: NameServer) -> None:
    names.address = FIRST_ADDRESS
    async with contextlib.AsyncExitStack() as stack:
        async with worker_at(FIRST_ADDRESS) as port:
            client = await stack.enter_async_context(client_of(names.target(port)))
            await find(client)
        # The name leads to the old address for a little longer.
        with pytest.raises(WorkerUnavailable):
            await client.get_info(TRY_S)
        names.address = SECOND_ADDRESS
        async with worker_at(SECOND_ADDRESS, port):
            await find(client)


async def test_a_channel_asks_again_for_a_name_that_leads_nowhere(names: NameServer) -> None:
    """The channel of a client or gateway, which is not made anew."""
    names.address = FIRST_ADDRESS
    async with (
        worker_at(SECOND_ADDRESS) as port,
        grpc.aio.insecure_channel(names.target(port), CHANNEL_OPTIONS) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=TRY_S, wait_for_ready=True)
        names.address = SECOND_ADDRESS
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S, wait_for_ready=True)


async def test_a_missing_name_is_asked_for_at_each_try(names: NameServer) -> None:
    async with worker_at(FIRST_ADDRESS) as port, client_of(names.target(port)) as client:
        for _ in range(NUM_TRIES):
            with pytest.raises(WorkerUnavailable):
                await client.get_info(TRY_S)
        # A busy machine may be late with one.
        assert names.num_questions >= NUM_TRIES - 1
        names.address = FIRST_ADDRESS
        await find(client)


async def test_why_there_is_no_worker_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        async with client_of(f"127.0.0.1:{port}") as client:
            with pytest.raises(WorkerUnavailable, match="it does not answer"):
                await client.get_info(TRY_S)
    async with client_of(f"127.0.0.1:{port}") as client:
        with pytest.raises(WorkerUnavailable, match="Connection refused"):
            await client.get_info(TRY_S)
