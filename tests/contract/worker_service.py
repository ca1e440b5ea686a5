"""A worker service around a fake runner, over real gRPC, and a client that speaks the step protocol."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

from tandem.internal.v1 import worker_pb2, worker_pb2_grpc
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tandem_shared.rpc.server import Server
from tandem_shared.rpc.session_secret import SecretInterceptor
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_codec import PROTOCOL_VERSION, encode_plan
from tandem_shared.step_plan import NewRow, StepPlan
from tandem_worker.service.servicer import SERVICE_NAME, WorkerServicer
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner

WAIT_S = 10


class Worker:
    """A worker service around a fake runner, and a client of it."""

    def __init__(self, runner: FakeRunner, *, secret: bytes = b"", **options: Any) -> None:
        """options: those of WorkerServicer."""
        self.runner = runner
        self.servicer = WorkerServicer(runner, **options)
        self.metadata: tuple[tuple[str, bytes], ...] = ()
        interceptors = [SecretInterceptor(secret)] if secret else []
        self.server = Server({SERVICE_NAME: self.servicer.add_to}, interceptors=interceptors)

    async def start(self) -> None:
        self.address = f"127.0.0.1:{await self.server.start('127.0.0.1', 0)}"
        await self.server.set_ready([SERVICE_NAME], True)
        self.channel = grpc.aio.insecure_channel(self.address, CHANNEL_OPTIONS)
        self.stub = worker_pb2_grpc.WorkerServiceStub(self.channel)

    async def stop(self) -> None:
        await self.channel.close()
        await self.server.stop(0)

    async def open(self, epoch: int = 1, scheduler_id: str = "a", **changes: Any) -> Any:
        """A session's call, opened; raises AioRpcError where it is refused."""
        opening = {
            "protocol_version": PROTOCOL_VERSION,
            "scheduler_id": scheduler_id,
            "session_epoch": epoch,
            "worker_instance_id": self.runner.info.worker_instance_id,
        }
        call: Any = self.stub.ExecuteSteps(metadata=self.metadata)
        await call.write(worker_pb2.ExecuteStepsRequest(open=worker_pb2.OpenSession(**{**opening, **changes})))
        response = await asyncio.wait_for(call.read(), WAIT_S)
        assert response.WhichOneof("kind") == "opened"
        return call


def prompt_plan(step_id: int, num_tokens: int = 5, row: int = 0) -> StepPlan:
    num_blocks = -(-(num_tokens + 3) // worker_info().block_size)
    new = NewRow(
        row=row,
        sequence_id=row,
        token_ids=np.ones(num_tokens, np.int32),
        num_prompt_tokens=num_tokens,
        num_computed_tokens=0,
        num_cached_tokens=0,
        block_ids=np.arange(1, num_blocks + 1, dtype=np.int32),
        sampling=RowSampling(),
    )
    chunk = np.array([num_tokens], np.int32)
    return StepPlan(step_id, added_rows=(new,), chunk_rows=np.array([row], np.int32), chunk_num_tokens=chunk)


async def send(call: Any, plan: StepPlan) -> None:
    await call.write(worker_pb2.ExecuteStepsRequest(plan=encode_plan(plan)))


async def read_result(call: Any) -> worker_pb2.StepResult:
    response = await asyncio.wait_for(call.read(), WAIT_S)
    assert response.WhichOneof("kind") == "result"
    result: worker_pb2.StepResult = response.result
    return result


async def status_of(call: Any) -> grpc.StatusCode:
    """The status that a call ends with, after the messages that still come."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await asyncio.wait_for(call.read(), WAIT_S) is not grpc.aio.EOF:
            pass
    code: grpc.StatusCode = caught.value.code()
    return code
