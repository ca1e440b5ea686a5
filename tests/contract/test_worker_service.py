"""The worker's side of the step protocol over real gRPC: the order of plans, bad plans, the end, health."""

import asyncio
import threading
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.internal.v1 import worker_pb2
from tandem_shared.step_codec import unpack_ids
from tandem_shared.step_plan import StepPlan
from tandem_worker.service.servicer import SERVICE_NAME
from tandem_worker.service.session import MAX_PLANS_WAITING
from tests.contract.worker_service import WAIT_S, Worker, prompt_plan, read_result, send, status_of
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner


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


async def test_a_plan_without_a_session_is_refused(worker: Worker) -> None:
    call: Any = worker.stub.ExecuteSteps()
    await send(call, prompt_plan(1))
    assert await status_of(call) == grpc.StatusCode.INVALID_ARGUMENT


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
    call: Any = worker.channel.stream_stream("/tandem.internal.v1.WorkerService/ExecuteSteps")()
    await call.write(b"\xff\xff")
    assert await status_of(call) == grpc.StatusCode.INVALID_ARGUMENT
    await worker.open()


@pytest.mark.parametrize(
    "changes",
    [{"removed_rows": [1] * 30_000_000}, {"added_rows": [worker_pb2.NewRow()] * 1_000_000}],
    ids=["row numbers", "rows"],
)
async def test_a_plan_that_takes_long_to_decode_is_refused_undecoded(worker: Worker, changes: dict[str, Any]) -> None:
    call = await worker.open()
    plan = worker_pb2.ExecuteStepsRequest(plan=worker_pb2.StepPlan(step_id=1, **changes))
    await call.write(plan)
    with pytest.raises(grpc.aio.AioRpcError, match="larger than any plan") as caught:
        while await asyncio.wait_for(call.read(), WAIT_S) is not grpc.aio.EOF:
            pass
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    await worker.open(epoch=2)


async def test_plans_without_end_are_refused() -> None:
    gate = threading.Semaphore(0)
    worker = Worker(FakeRunner(worker_info(), gate=gate))
    await worker.start()
    call = await worker.open()
    await send(call, prompt_plan(1, num_tokens=14))
    for step_id in range(2, MAX_PLANS_WAITING + 2):
        await send(call, StepPlan(step_id))
    response = await asyncio.wait_for(call.read(), WAIT_S)
    assert f"more than {MAX_PLANS_WAITING} plans" in status_pb2.Status.FromString(response.last_word).message
    gate.release(1000)
    await worker.stop()


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
