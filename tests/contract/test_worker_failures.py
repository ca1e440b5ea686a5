"""A worker fails by stopping: steps that fail or hang, over real gRPC."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem_shared.errors import WorkerFailed
from tandem_shared.rpc.rich_status import error_of, read_status
from tandem_shared.step_plan import StepPlan, StepResult
from tandem_worker.service.servicer import SERVICE_NAME
from tests.contract.worker_service import WAIT_S, Worker, prompt_plan, read_result, send
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner


class FailingStep:
    """A step that is queued, and fails when its result is waited for, as CUDA's errors come."""

    def wait(self) -> StepResult:
        raise RuntimeError("an illegal memory access")


def fail_at_launch(plan: StepPlan) -> FailingStep:
    raise RuntimeError("an illegal memory access")


async def ready_status(worker: Worker) -> str:
    response = await health_pb2_grpc.HealthStub(worker.channel).Check(
        health_pb2.HealthCheckRequest(service=SERVICE_NAME)
    )
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


async def check_fails_by_stopping(worker: Worker, call: Any, reason: str) -> None:
    """Checks the order of the worker's end: readiness goes, the session gets the reason as its last word, no other
    session is opened, and the process is told the reason.
    """
    statuses = []

    async def go_unready() -> None:
        await worker.server.set_ready([SERVICE_NAME], False)
        statuses.append(await ready_status(worker))

    failing = asyncio.create_task(worker.servicer.run_until_failure(go_unready))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while (response := await asyncio.wait_for(call.read(), WAIT_S)) is not grpc.aio.EOF:
            last = response
    assert isinstance(read_status(status_pb2.Status.FromString(last.last_word)), WorkerFailed)
    assert statuses == ["NOT_SERVING"], "the session heard it before readiness went"
    assert caught.value.code() == grpc.StatusCode.INTERNAL and reason in (caught.value.details() or "")
    assert isinstance(error_of(caught.value), WorkerFailed)
    assert reason in await asyncio.wait_for(failing, WAIT_S)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.open(epoch=2)
    assert isinstance(error_of(caught.value), WorkerFailed)


@pytest.mark.parametrize("execute", [fail_at_launch, lambda plan: FailingStep()], ids=["at launch", "at its end"])
async def test_a_step_that_fails_ends_the_worker(worker: Worker, execute: Callable[[StepPlan], Any]) -> None:
    call = await worker.open()
    worker.runner.execute = execute  # type: ignore[method-assign]
    await send(call, prompt_plan(1))
    await check_fails_by_stopping(worker, call, "step 1 failed: RuntimeError('an illegal memory access')")


async def test_a_step_that_fails_after_its_session_ends_the_worker_too(worker: Worker) -> None:
    gate, has_begun = threading.Semaphore(0), threading.Event()

    class LateFailure:
        def wait(self) -> StepResult:
            has_begun.set()
            gate.acquire()
            raise RuntimeError("too late")

    worker.runner.execute = lambda plan: LateFailure()  # type: ignore[method-assign, assignment, return-value]
    call = await worker.open()
    await send(call, prompt_plan(1))
    await asyncio.to_thread(has_begun.wait, WAIT_S)
    call.cancel()
    await asyncio.sleep(0.1)
    gate.release()
    assert "too late" in await asyncio.wait_for(worker.servicer.run_until_failure(), WAIT_S)


async def test_a_batch_that_cannot_be_emptied_ends_the_worker(worker: Worker) -> None:
    def reset() -> None:
        raise RuntimeError("no")

    worker.runner.reset = reset  # type: ignore[method-assign]
    with pytest.raises(grpc.aio.AioRpcError):
        await worker.open()
    assert "emptied" in await asyncio.wait_for(worker.servicer.run_until_failure(), WAIT_S)


async def test_a_step_that_hangs_ends_the_worker_and_names_the_setting() -> None:
    worker = Worker(FakeRunner(worker_info(), gate=threading.Semaphore(0)), step_timeout_s=0.5)
    await worker.start()
    call = await worker.open()
    await send(call, prompt_plan(1))
    await check_fails_by_stopping(worker, call, "step 1 has made no progress for")
    assert "--step-timeout-s is 0.5" in await worker.servicer.run_until_failure()
    worker.runner.gate.release(10)  # type: ignore[union-attr]
    await worker.stop()


async def test_a_step_that_hangs_past_its_sessions_end_ends_the_worker_too() -> None:
    """The scheduler died, or gave the step up first. Otherwise the next session could never begin."""
    worker = Worker(FakeRunner(worker_info(), gate=threading.Semaphore(0)), step_timeout_s=0.5)
    await worker.start()
    call = await worker.open()
    await send(call, prompt_plan(1))
    async with asyncio.timeout(WAIT_S):
        while not worker.runner.num_steps:
            await asyncio.sleep(0.01)
    call.cancel()
    assert "step 1 has made no progress" in await asyncio.wait_for(worker.servicer.run_until_failure(), WAIT_S)
    worker.runner.gate.release(10)  # type: ignore[union-attr]
    await worker.stop()


async def test_a_session_that_ends_after_idling_is_no_hang() -> None:
    worker = Worker(FakeRunner(worker_info()), step_timeout_s=0.5)
    await worker.start()
    for epoch in (1, 2):
        call = await worker.open(epoch=epoch)
        await send(call, prompt_plan(1))
        await read_result(call)
        await asyncio.sleep(0.8)
        call.cancel()
    failing = asyncio.create_task(worker.servicer.run_until_failure())
    await asyncio.sleep(0.8)
    assert not failing.done()
    failing.cancel()
    await worker.stop()


async def test_a_long_step_that_makes_progress_is_no_failure_and_says_so() -> None:
    """A step of ten times the limit: the stream tells its progress, and then its result."""
    gate = threading.Semaphore(0)
    worker = Worker(FakeRunner(worker_info(), gate=gate), step_timeout_s=0.3)
    await worker.start()
    call = await worker.open()
    await send(call, prompt_plan(1))
    num_progress = 0
    for _ in range(30):
        await asyncio.sleep(0.1)
        worker.runner.progress += 1
    gate.release()
    while (response := await asyncio.wait_for(call.read(), WAIT_S)).WhichOneof("kind") == "progress":
        num_progress += 1
    assert response.result.step_id == 1
    assert num_progress >= 10
    await worker.stop()


async def test_an_idle_session_is_no_stalled_step() -> None:
    worker = Worker(FakeRunner(worker_info()), step_timeout_s=0.5)
    await worker.start()
    call = await worker.open()
    await asyncio.sleep(0.8)
    await send(call, prompt_plan(1))
    assert (await read_result(call)).step_id == 1
    await worker.stop()
