"""Who may have a session with a worker, over real gRPC: opening, takeover, the secret."""

import asyncio
import threading
from typing import Any

import grpc
import pytest

from tandem.internal.v1 import worker_pb2
from tandem_shared.rpc.session_secret import SECRET_METADATA_KEY
from tandem_shared.step_codec import PROTOCOL_VERSION
from tests.contract.worker_service import WAIT_S, Worker, prompt_plan, read_result, send, status_of
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner


@pytest.mark.parametrize(
    "changes", [{"protocol_version": PROTOCOL_VERSION + 1}, {"worker_instance_id": "another"}], ids=str
)
async def test_a_session_that_does_not_fit_is_refused(worker: Worker, changes: dict[str, Any]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.open(**changes)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    await worker.open()


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
    """Someone who knew the name could take the session with a newer epoch."""
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
    """Opens a session once the worker has noticed that the one before was cancelled."""
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


async def test_the_epoch_of_a_dead_session_does_not_count(worker: Worker) -> None:
    """A session with the largest epoch there is, once it has ended, locks no scheduler out."""
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
