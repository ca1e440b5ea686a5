"""A line in the log for each control RPC that changed something: what was done, by whose key, from where."""

import logging
from types import SimpleNamespace
from typing import Any

from tandem.v1 import control_pb2
from tandem_shared.rpc.authorizer import CALLER

CHANGES = ("Abort", "Drain", "Undrain", "ResetPrefixCache")

logger = logging.getLogger(__name__)


def audited(control: Any) -> Any:
    """The servicer of ControlService `control`, whose CHANGES are logged as warnings."""
    methods = {}
    for rpc in control_pb2.DESCRIPTOR.services_by_name["ControlService"].methods:
        method = getattr(control, rpc.name)
        methods[rpc.name] = _audited(method, rpc.name) if rpc.name in CHANGES else method
    return SimpleNamespace(**methods)


def _audited(method: Any, name: str) -> Any:
    async def call(request: Any, context: Any) -> Any:
        if name == "Drain":
            # It refuses requests from now on, and may wait for long.
            _log(name, request, context)
            return await method(request, context)
        response = await method(request, context)
        _log(name, request, context)
        return response

    return call


def _log(name: str, request: Any, context: Any) -> None:
    key = CALLER.get()
    caller = f"the key {key.name}" if key is not None else "a caller without a key"
    target = f" of {request.request_id!r}" if name == "Abort" else ""
    logger.warning("%s%s by %s, %s", name, target, caller, context.peer())
