"""The worker's side of the step protocol over real gRPC: sessions, fencing, order, bad plans."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.grpc_options import CHANNEL_OPTIONS
from shared.server import Server
from shared.step_codec import PROTOCOL_VERSION, encode_plan, unpack_ids
from shared.step_plan import NewRow, RowSampling, StepPlan
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tests.builders import worker_info
from tests.fake_worker import FakeRunner
from worker_service.servicer import SERVICE_NAME, WorkerServicer

WAIT_S = 10


class Worker:
    """A worker service around a fake runner, and a client of it."""

    def __init__(self, runner: FakeRunner) -> None:
        self.runner = runner
        self.servicer = WorkerServicer(runner)
        self.server = Server(
            {SERVICE_NAME: lambda s: worker_pb2_grpc.add_WorkerServiceServicer_to_server(self.servicer, s)}
        )

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
        call: Any = self.stub.ExecuteSteps()
        await call.write(worker_pb2.ExecuteStepsRequest(open=worker_pb2.OpenSession(**{**opening, **changes})))
        response = await asyncio.wait_for(call.read(), WAIT_S)
        assert response.WhichOneof("kind") == "opened"
        return call


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker(FakeRunner(worker_info(num_blocks=4000, max_model_len=50_000, max_num_batched_tokens=50_000)))
    await worker.start()
    yield worker
    await worker.stop()


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
    """How a call ends, whatever it still had to say."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await asyncio.wait_for(call.read(), WAIT_S) is not grpc.aio.EOF:
            pass
    code: grpc.StatusCode = caught.value.code()
    return code


async def test_results_come_in_the_order_of_the_plans_with_their_times(worker: Worker) -> None:
    call = await worker.open()
    plans = [prompt_plan(1), StepPlan(2), StepPlan(3)]
    for plan in plans:
        await send(call, plan)
    results = [await read_result(call) for _ in plans]
    assert [result.step_id for result in results] == [1, 2, 3]
    for result in results:
        assert 0 < result.times.received_ns <= result.times.sent_ns


async def test_a_plan_of_40000_tokens_passes(worker: Worker) -> None:
    call = await worker.open()
    await send(call, prompt_plan(1, num_tokens=40_000))
    assert len(unpack_ids((await read_result(call)).token_ids)) == 1


@pytest.mark.parametrize(
    "changes", [{"protocol_version": PROTOCOL_VERSION + 1}, {"worker_instance_id": "another"}], ids=str
)
async def test_a_session_that_does_not_fit_is_refused(worker: Worker, changes: dict[str, Any]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.open(**changes)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    await worker.open()


async def test_a_plan_without_a_session_is_refused(worker: Worker) -> None:
    call: Any = worker.stub.ExecuteSteps()
    await send(call, prompt_plan(1))
    assert await status_of(call) == grpc.StatusCode.INTERNAL


async def test_another_scheduler_is_refused_while_the_session_lives(worker: Worker) -> None:
    first = await worker.open(scheduler_id="a")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.open(scheduler_id="b", epoch=99)
    assert caught.value.code() == grpc.StatusCode.ABORTED
    await send(first, prompt_plan(1))
    await read_result(first)
    first.cancel()
    await open_when_free(worker, scheduler_id="b")


async def open_when_free(worker: Worker, **opening: Any) -> Any:
    """The session before was cancelled; the worker notices soon."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await worker.open(**opening)
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.ABORTED
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("epoch", [5, 4])
async def test_an_epoch_that_is_not_newer_is_refused(worker: Worker, epoch: int) -> None:
    await worker.open(epoch=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.open(epoch=epoch)
    assert caught.value.code() == grpc.StatusCode.ABORTED


async def test_a_newer_epoch_takes_over_with_an_empty_batch(worker: Worker) -> None:
    old = await worker.open(epoch=1)
    await send(old, prompt_plan(1))
    await read_result(old)
    new = await worker.open(epoch=2)
    assert await status_of(old) == grpc.StatusCode.ABORTED
    # The same row is free, and step ids begin again.
    await send(new, prompt_plan(1))
    assert (await read_result(new)).step_id == 1


async def test_a_takeover_drops_plans_that_have_not_started() -> None:
    gate = threading.Semaphore(0)
    worker = Worker(FakeRunner(worker_info(), gate=gate))
    await worker.start()
    old = await worker.open(epoch=1)
    await send(old, prompt_plan(1))
    opening = asyncio.create_task(worker.open(epoch=2))
    assert await status_of(old) == grpc.StatusCode.ABORTED
    gate.release(10)
    new = await asyncio.wait_for(opening, WAIT_S)
    await send(new, prompt_plan(1))
    assert (await read_result(new)).step_id == 1
    await worker.stop()


async def test_closing_waits_for_steps_that_have_begun_but_not_for_ever() -> None:
    gate = threading.Semaphore(0)
    worker = Worker(FakeRunner(worker_info(), gate=gate))
    await worker.start()
    assert await worker.servicer.close(0.0)
    call = await worker.open()
    await send(call, prompt_plan(1))
    async with asyncio.timeout(WAIT_S):
        while not worker.runner.num_steps:
            await asyncio.sleep(0.01)
        assert not await worker.servicer.close(0.1)
        closing = asyncio.create_task(worker.servicer.close(WAIT_S))
        await asyncio.sleep(0.1)
        assert not closing.done()
        gate.release()
        assert await closing
    await worker.stop()


@pytest.mark.parametrize(
    "plan", [StepPlan(2), StepPlan(1, removed_rows=np.array([3], np.int32))], ids=["step id", "row"]
)
async def test_an_impossible_plan_ends_the_session(worker: Worker, plan: StepPlan) -> None:
    call = await worker.open()
    await send(call, plan)
    assert await status_of(call) == grpc.StatusCode.INVALID_ARGUMENT
    again = await worker.open(epoch=2)
    await send(again, prompt_plan(1))
    assert (await read_result(again)).step_id == 1


async def test_bytes_that_are_no_message_end_the_session(worker: Worker) -> None:
    call: Any = worker.channel.stream_stream("/tandem.v1.WorkerService/ExecuteSteps")()
    await call.write(b"\xff\xff")
    assert await status_of(call) == grpc.StatusCode.INVALID_ARGUMENT
    await worker.open()


async def test_a_runner_that_fails_ends_the_session_and_not_the_worker(worker: Worker) -> None:
    call = await worker.open()
    worker.runner.execute, execute = None, worker.runner.execute  # type: ignore[assignment, method-assign]
    await send(call, prompt_plan(1))
    assert await status_of(call) == grpc.StatusCode.INTERNAL
    worker.runner.execute = execute  # type: ignore[method-assign]
    again = await worker.open(epoch=2)
    await send(again, prompt_plan(1))
    assert (await read_result(again)).step_id == 1


async def test_health_tells_liveness_from_readiness_and_can_be_watched(worker: Worker) -> None:
    status = health_pb2.HealthCheckResponse.ServingStatus
    stub = health_pb2_grpc.HealthStub(worker.channel)

    async def check(service: str) -> str:
        return status.Name((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)

    assert (await check(""), await check(SERVICE_NAME)) == ("SERVING", "SERVING")
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert status.Name((await watch.read()).status) == "SERVING"
    await worker.server.set_ready([SERVICE_NAME], False)
    assert status.Name((await watch.read()).status) == "NOT_SERVING"
    assert (await check(""), await check(SERVICE_NAME)) == ("SERVING", "NOT_SERVING")
    watch.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check("no.such.Service")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
