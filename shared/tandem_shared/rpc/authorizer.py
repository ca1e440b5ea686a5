"""Who may call which method of a server: an interceptor that knows API keys, and that reads no request.

A call that is refused here takes no place and none of its request is read (error_interceptor.py).
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import grpc
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health

from tandem_shared.errors import PermissionDenied
from tandem_shared.rpc.api_keys import ApiKey, KeyFile, Scope
from tandem_shared.rpc.reflection import SERVICE_NAMES

AUTHORIZATION = "authorization"

CALLER: ContextVar[ApiKey | None] = ContextVar("caller", default=None)
"""In a call's task: the key that it came with, or None if the server has no keys."""

SCOPES: Mapping[str, Scope | None] = {
    health.SERVICE_NAME: None,
    **dict.fromkeys(SERVICE_NAMES, Scope.INFERENCE),
    channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name: Scope.CONTROL,
}
"""What every server's own services need; None is for anybody."""


class Authorizer(grpc.aio.ServerInterceptor):
    """Refuses calls whose key does not have the scope that their method needs."""

    def __init__(self, keys: KeyFile | None, scopes: Mapping[str, Scope | None], open_scopes: Iterable[Scope]) -> None:
        """scopes: by a service's name or SERVICE/METHOD, which wins; what is in neither, nor in SCOPES, needs CONTROL.
        Without keys anybody may call what needs one of open_scopes, and nobody the rest.
        """
        self._keys = keys
        self._scopes = {**SCOPES, **scopes}
        self._open_scopes = frozenset(open_scopes)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method.removeprefix("/")
        scope = self._scopes.get(method, self._scopes.get(method.rpartition("/")[0], Scope.CONTROL))
        if scope is not None:
            CALLER.set(self._check(scope, handler_call_details.invocation_metadata))
        return await continuation(handler_call_details)

    def _check(self, scope: Scope, metadata: Any) -> ApiKey | None:
        if self._keys is None:
            if scope not in self._open_scopes:
                raise PermissionDenied(
                    "on an address that others reach this needs an API key: start the server with --api-key-file"
                )
            return None
        key = self._keys.find([value for name, value in metadata or () if name == AUTHORIZATION])
        key.check_scope(scope)
        return key
