"""The worker as the step loop sees it, and its gRPC implementation. Knows the wire, decides nothing."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
from google.rpc import status_pb2

from tandem.internal.v1 import worker_pb2, worker_pb2_grpc
from tandem_shared.errors import InvalidPlan, ProtocolError, SessionTaken, TandemError, WorkerFailed, WorkerUnavailable
from tandem_shared.host.reloaded import Reloaded
from tandem_shared.rpc.credentials import open_channel
from tandem_shared.rpc.grpc_options import WORKER_CHANNEL_OPTIONS
from tandem_shared.rpc.rich_status import error_of, read_status
from tandem_shared.rpc.session_secret import SECRET_METADATA_KEY
from tandem_shared.step_codec import PROTOCOL_VERSION, decode_info, decode_result, encode_plan
from tandem_shared.step_plan import StepPlan, StepResult, WorkerInfo

CONNECT_TIMEOUT_S = 5.0
ASK_WHY_S = 0.1


class WorkerSession(Protocol):
    """One session with one worker."""

    info: WorkerInfo
    heard_at: float
    """When the worker last sent anything, in seconds of time.monotonic()."""

    async def send(self, plan: StepPlan) -> int:
        """Sends a plan, and returns the size of its message in bytes."""

    def results(self) -> AsyncIterator[StepResult]:
        """Yields results in the order of the plans until the session ends, and then raises the reason: WorkerFailed or
        InvalidPlan if the worker said that a step failed, WorkerUnavailable for any other end.
        """

    async def close(self) -> None: ...


class WorkerClient(Protocol):
    """A worker at an address, whether it is there or not."""

    address: str
    """HOST:PORT"""

    async def get_info(self, timeout_s: float) -> WorkerInfo:
        """What the worker is. Raises WorkerUnavailable if none answers in time."""

    async def open_session(
        self, info: WorkerInfo, scheduler_id: str, epoch: int, num_live_sequences: int
    ) -> WorkerSession:
        """Raises SessionTaken if another scheduler has the worker, else WorkerUnavailable if it refuses."""

    async def close(self) -> None: ...


class GrpcWorkerClient:
    """A worker service at an address."""

    def __init__(
        self, address: str, credentials: Reloaded[grpc.ChannelCredentials] | None = None, *, secret: bytes = b""
    ) -> None:
        """credentials: without them there is no TLS."""
        self.address = address
        self._metadata = ((SECRET_METADATA_KEY, secret),) if secret else ()
        self._credentials = credentials
        self._connect()

    def _connect(self) -> None:
        credentials = self._credentials.value if self._credentials is not None else None
        self._channel = open_channel(self.address, credentials, WORKER_CHANNEL_OPTIONS)
        self._stub = worker_pb2_grpc.WorkerServiceStub(self._channel)

    async def get_info(self, timeout_s: float) -> WorkerInfo:
        # Nothing runs on the channel when a worker is looked for.
        if self._credentials is not None and self._credentials.refresh():
            await self._channel.close()
            self._connect()
        try:
            # With wait_for_ready a channel in backoff tries again within the time.
            response = await self._stub.GetWorkerInfo(
                worker_pb2.GetWorkerInfoRequest(), timeout=timeout_s, wait_for_ready=True, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            reason = await self._why_not(error)
            # A channel looks up a name that is missing less and less often, down to once in 2 minutes; a new one does
            # so at once. In Kubernetes a worker's name is missing from its end until the next one has an address.
            await self._channel.close()
            self._connect()
            raise WorkerUnavailable(reason) from error
        return decode_info(response)

    async def _why_not(self, error: grpc.aio.AioRpcError) -> str:
        """Why there is no answer. A call that waited for a connection does not know why there was none; one that does
        not wait is told.
        """
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            return str(error.details())
        try:
            await self._stub.GetWorkerInfo(
                worker_pb2.GetWorkerInfoRequest(), timeout=ASK_WHY_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as second:
            if second.code() is grpc.StatusCode.UNAVAILABLE:
                return str(second.details())
        return "it does not answer"

    async def open_session(
        self, info: WorkerInfo, scheduler_id: str, epoch: int, num_live_sequences: int
    ) -> WorkerSession:
        # Any, because the stubs declare that read() gives an object.
        call: Any = self._stub.ExecuteSteps(metadata=self._metadata)
        opening = worker_pb2.OpenSession(
            protocol_version=PROTOCOL_VERSION,
            scheduler_id=scheduler_id,
            session_epoch=epoch,
            worker_instance_id=info.worker_instance_id,
            num_live_sequences=num_live_sequences,
        )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await call.write(worker_pb2.ExecuteStepsRequest(open=opening))
                response = await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            call.cancel()
            is_taken = isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.ABORTED
            raise (SessionTaken if is_taken else WorkerUnavailable)(_why(error)) from error
        if response is grpc.aio.EOF or response.WhichOneof("kind") != "opened":
            call.cancel()
            raise WorkerUnavailable("it did not open the session")
        return GrpcWorkerSession(info, call)

    async def close(self) -> None:
        await self._channel.close()


class GrpcWorkerSession:
    """An ExecuteSteps stream whose first message was answered."""

    def __init__(self, info: WorkerInfo, call: Any) -> None:
        self.info = info
        self.heard_at = time.monotonic()
        self._call = call

    async def send(self, plan: StepPlan) -> int:
        message = worker_pb2.ExecuteStepsRequest(plan=encode_plan(plan))
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise WorkerUnavailable(_why(error)) from error
        return message.ByteSize()

    async def results(self) -> AsyncIterator[StepResult]:
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                self.heard_at = time.monotonic()
                match response.WhichOneof("kind"):
                    case "result":
                        yield decode_result(response.result)
                    case "progress":
                        pass
                    case "last_word":
                        raise _error_of_last_word(response.last_word)
                    case kind:
                        raise ProtocolError(f"the worker answered a plan with {kind}")
        except grpc.aio.AioRpcError as error:
            raise WorkerUnavailable(_why(error)) from error
        raise WorkerUnavailable("the worker ended the session")

    async def close(self) -> None:
        self._call.cancel()


def _error_of_last_word(data: bytes) -> TandemError:
    """WorkerFailed and InvalidPlan as they are; any other reason as WorkerUnavailable."""
    status = status_pb2.Status.FromString(data)
    error = read_status(status)
    return error if isinstance(error, WorkerFailed | InvalidPlan) else WorkerUnavailable(status.message)


def _why(error: grpc.aio.AioRpcError | asyncio.InvalidStateError | TimeoutError) -> str:
    """Why a stream ended or was refused, in words: the worker's own where it said something."""
    if isinstance(error, TimeoutError):
        return f"no answer in {CONNECT_TIMEOUT_S:g} s"
    if isinstance(error, asyncio.InvalidStateError):
        return "the stream has ended"
    details = error.details() or str(error.code())
    return details if error_of(error) is not error else f"the link to the worker is lost ({details})"
