"""The control RPCs in a front-end process: the scheduler process answers them, whichever front end is asked."""

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

from tandem.v1 import control_pb2, control_pb2_grpc
from tandem_shared.errors import WorkerUnavailable
from tandem_shared.rpc.rich_status import error_of

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ControlForwarder(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, scheduler: Any) -> None:
        """scheduler: the ControlService stub of the scheduler process."""
        self._scheduler = scheduler

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.GetServerInfoResponse:
        response: control_pb2.GetServerInfoResponse = await _forward(self._scheduler.GetServerInfo, request)
        return response

    async def GetLoad(self, request: control_pb2.GetLoadRequest, context: Context) -> control_pb2.GetLoadResponse:
        response: control_pb2.GetLoadResponse = await _forward(self._scheduler.GetLoad, request)
        return response

    async def Abort(self, request: control_pb2.AbortRequest, context: Context) -> control_pb2.AbortResponse:
        response: control_pb2.AbortResponse = await _forward(self._scheduler.Abort, request)
        return response

    async def Drain(self, request: control_pb2.DrainRequest, context: Context) -> control_pb2.DrainResponse:
        response: control_pb2.DrainResponse = await _forward(self._scheduler.Drain, request)
        return response

    async def ResetPrefixCache(
        self, request: control_pb2.ResetPrefixCacheRequest, context: Context
    ) -> control_pb2.ResetPrefixCacheResponse:
        response: control_pb2.ResetPrefixCacheResponse = await _forward(self._scheduler.ResetPrefixCache, request)
        return response


async def _forward(method: Callable[[Any], Any], request: Any) -> Any:
    """A call that is cancelled, or whose deadline passes, cancels the one that it makes."""
    try:
        return await method(request)
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.UNAVAILABLE and error_of(error) is error:
            raise WorkerUnavailable("the server is stopping") from error
        raise error_of(error) from error
