"""The worker's side of the step protocol over real gRPC: sessions, fencing, order, bad plans."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.internal.v1 import worker_pb2, worker_pb2_grpc
from tandem_shared.errors import WorkerFailed
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tandem_shared.rpc.rich_status import error_of, read_status
from tandem_shared.rpc.server import Server
from tandem_shared.rpc.session_secret import SECRET_METADATA_KEY
from tandem_shared.step_codec import PROTOCOL_VERSION, encode_plan, unpack_ids
from tandem_shared.step_plan import NewRow, RowSampling, StepPlan, StepResult
from tandem_worker.service.servicer import SERVICE_NAME, WorkerServicer
from tandem_worker.service.session import MAX_PLANS_WAITING
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner

WAIT_S = 10


class Worker:
    """A worker service around a fake runner, and a client of it."""

    def __init__(self, runner: FakeRunner, **options: Any) -> None:
        """options: WorkerServicer's."""
        self.runner = runner
        self.servicer = WorkerServicer(runner, **options)
        self.metadata: tuple[tuple[str, bytes], ...] = ()
        self.server = Server({SERVICE_NAME: self.servicer.add_to})

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
    assert await status_of(call) == grpc.StatusCode.INVALID_ARGUMENT


async def test_another_scheduler_is_refused_while_the_session_lives(worker: Worker) -> None:
    first = await worker.open(scheduler_id="a")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.open(scheduler_id="b", epoch=99)
    assert caught.value.code() == grpc.StatusCode.ABORTED
    await send(first, prompt_plan(1))
    await read_result(first)
    first.cancel()
    await open_when_free(worker, scheduler_id="b")


async def test_no_refusal_tells_the_name_of_a_session(worker: Worker) -> None:
    """Whoever knows it could take the session with a newer epoch."""
    idle = await worker.open(scheduler_id="secret-1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.open(scheduler_id="b")
    assert caught.value.code() == grpc.StatusCode.ABORTED
    assert "secret" not in str(caught.value)
    await worker.open(scheduler_id="secret-2", num_live_sequences=1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while response := await asyncio.wait_for(idle.read(), WAIT_S):
            assert b"secret" not in response.SerializeToString()
    assert caught.value.code() == grpc.StatusCode.ABORTED
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("scheduler_id", ["", "x" * 257, "a\nb"], ids=["none", "long", "two lines"])
async def test_a_scheduler_id_that_no_log_can_take_is_refused(worker: Worker, scheduler_id: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.open(scheduler_id=scheduler_id)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    await worker.open()


async def test_a_session_that_is_opened_twice_ends(worker: Worker) -> None:
    call = await worker.open()
    await call.write(worker_pb2.ExecuteStepsRequest(open=worker_pb2.OpenSession()))
    assert await status_of(call) == grpc.StatusCode.INVALID_ARGUMENT


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
    held = await worker.open(epoch=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.open(epoch=epoch)
    assert caught.value.code() == grpc.StatusCode.ABORTED
    held.cancel()


async def test_a_dead_sessions_epoch_is_nobodys(worker: Worker) -> None:
    """Whoever opened one with the last epoch there is and left has locked nobody out."""
    intruder = await worker.open(epoch=2**64 - 1)
    intruder.cancel()
    await open_when_free(worker, epoch=1)


async def test_a_scheduler_with_live_sequences_comes_before_an_idle_one(worker: Worker) -> None:
    idle = await worker.open(scheduler_id="idle")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.open(scheduler_id="as idle")
    assert caught.value.code() == grpc.StatusCode.ABORTED
    busy = await worker.open(scheduler_id="busy", num_live_sequences=3)
    assert await status_of(idle) == grpc.StatusCode.ABORTED
    await send(busy, prompt_plan(1))
    assert (await read_result(busy)).step_id == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.open(scheduler_id="late", num_live_sequences=99)
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
    """Readiness first, then the reason as the session's last word; then no session, and the process knows why."""
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
    await check_fails_by_stopping(worker, call, "step 1 has not got on for")
    assert "--step-timeout-s is 0.5" in await worker.servicer.run_until_failure()
    worker.runner.gate.release(10)  # type: ignore[union-attr]
    await worker.stop()


async def test_a_step_that_hangs_past_its_sessions_end_ends_the_worker_too() -> None:
    """Its scheduler died, or gave it up first: the next session could never begin."""
    worker = Worker(FakeRunner(worker_info(), gate=threading.Semaphore(0)), step_timeout_s=0.5)
    await worker.start()
    call = await worker.open()
    await send(call, prompt_plan(1))
    async with asyncio.timeout(WAIT_S):
        while not worker.runner.num_steps:
            await asyncio.sleep(0.01)
    call.cancel()
    assert "step 1 has not got on" in await asyncio.wait_for(worker.servicer.run_until_failure(), WAIT_S)
    worker.runner.gate.release(10)  # type: ignore[union-attr]
    await worker.stop()


async def test_a_session_that_ends_after_idling_is_no_hang() -> None:
    worker = Worker(FakeRunner(worker_info()), step_timeout_s=0.2)
    await worker.start()
    for epoch in (1, 2):
        call = await worker.open(epoch=epoch)
        await send(call, prompt_plan(1))
        await read_result(call)
        await asyncio.sleep(0.5)
        call.cancel()
    failing = asyncio.create_task(worker.servicer.run_until_failure())
    await asyncio.sleep(0.5)
    assert not failing.done()
    failing.cancel()
    await worker.stop()


async def test_a_long_step_that_gets_on_is_no_failure_and_says_so() -> None:
    """Ten times the limit: the stream hears of it, and the result comes."""
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
    worker = Worker(FakeRunner(worker_info()), step_timeout_s=0.1)
    await worker.start()
    call = await worker.open()
    await asyncio.sleep(0.5)
    await send(call, prompt_plan(1))
    assert (await read_result(call)).step_id == 1
    await worker.stop()


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


@pytest.mark.parametrize("shown", [(), ((SECRET_METADATA_KEY, b"another secret"),)], ids=["none", "another"])
async def test_without_the_secret_there_is_no_session(shown: tuple[tuple[str, bytes], ...]) -> None:
    worker = Worker(FakeRunner(worker_info()), secret=b"the right secret")
    await worker.start()
    worker.metadata = shown
    for call in (worker.open(), worker.stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), metadata=shown)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    worker.metadata = ((SECRET_METADATA_KEY, b"the right secret"),)
    await worker.open()
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
