"""The control RPCs in a front-end process: the scheduler process answers them, whichever front end is asked."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc

from tandem.v1 import control_pb2
from tandem_shared.errors import WorkerUnavailable
from tandem_shared.rpc.rich_status import error_of

SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"]


def create_forwarder(scheduler: Any) -> Any:
    """A servicer of ControlService that forwards every call. scheduler: the service's stub in the scheduler process."""
    names = [rpc.name for rpc in SERVICE.methods]
    return SimpleNamespace(**{name: functools.partial(_forward, getattr(scheduler, name)) for name in names})


async def _forward(call: Callable[[Any], Any], request: Any, context: Any) -> Any:
    """A call that is cancelled, or whose deadline passes, cancels the one that it makes."""
    try:
        return await call(request)
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.UNAVAILABLE and error_of(error) is error:
            raise WorkerUnavailable("the server is stopping") from error
        raise error_of(error) from error
