"""What the log says of a session that ends: the worker's own words, or plainly that its link was lost."""

import asyncio

import grpc
import pytest

from tandem_scheduler.engine.worker_client import GrpcWorkerSession
from tandem_shared.errors import SessionTaken, WorkerUnavailable
from tandem_shared.rpc.rich_status import DETAILS_METADATA_KEY, status_of
from tandem_shared.step_plan import StepPlan
from tests.support.builders import worker_info

TAKEN = status_of(SessionTaken("another scheduler has it"))


def rpc_error(code: grpc.StatusCode, details: str, status: bytes | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(*([(DETAILS_METADATA_KEY, status)] if status is not None else []))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)


class EndedCall:
    def __init__(self, error: Exception) -> None:
        self._error = error

    async def read(self) -> None:
        raise self._error

    async def write(self, message: object) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        # gRPC's own words after the worker's machine, or this process, stood still for long.
        (rpc_error(grpc.StatusCode.INTERNAL, "Internal error from Core"), "the link to the worker is lost"),
        (rpc_error(grpc.StatusCode.UNAVAILABLE, "Socket closed"), r"the link to the worker is lost \(Socket closed\)"),
        (rpc_error(grpc.StatusCode.ABORTED, TAKEN.message, TAKEN.SerializeToString()), "^another scheduler has it$"),
    ],
)
async def test_why_a_session_ended(error: grpc.aio.AioRpcError, said: str) -> None:
    session = GrpcWorkerSession(worker_info(), EndedCall(error))
    with pytest.raises(WorkerUnavailable, match=said):
        await anext(aiter(session.results()))
    with pytest.raises(WorkerUnavailable, match=said):
        await session.send(StepPlan(step_id=1))


async def test_a_plan_for_a_stream_that_has_ended() -> None:
    session = GrpcWorkerSession(worker_info(), EndedCall(asyncio.InvalidStateError("RPC is done")))
    with pytest.raises(WorkerUnavailable, match="the stream has ended"):
        await session.send(StepPlan(step_id=1))
