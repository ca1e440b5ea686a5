"""The one place where errors leave the server, as gRPC statuses with google.rpc details.

Wraps Tandem's own services; the standard ones (health, reflection, channelz) are left as they are.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message

from shared.errors import FieldViolation, InvalidRequest, TandemError
from shared.rich_status import DETAILS_METADATA_KEY, code_of, status_of

logger = logging.getLogger(__name__)

OUR_METHODS = "/tandem."


class _Undecodable:
    """Stands for request bytes that are no message; raising inside gRPC's deserialiser would give INTERNAL."""

    def __init__(self, message_name: str) -> None:
        self.message_name = message_name


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps TandemError to its status, bytes that are no message to INVALID_ARGUMENT, and our bugs to INTERNAL."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(OUR_METHODS):
            return handler
        if handler.unary_unary:
            make, wrapped = grpc.unary_unary_rpc_method_handler, _wrap_unary(handler.unary_unary)
        elif handler.unary_stream:
            make, wrapped = grpc.unary_stream_rpc_method_handler, _wrap_streaming(handler.unary_stream, _checked)
        else:
            make, wrapped = grpc.stream_stream_rpc_method_handler, _wrap_streaming(handler.stream_stream, _all_checked)
        return make(wrapped, _tolerant(handler.request_deserializer), handler.response_serializer)


async def abort_with(context: "grpc.aio.ServicerContext[Any, Any]", error: Exception) -> NoReturn:
    """Ends the call with the error's status. Never returns."""
    if isinstance(error, TandemError):
        status = status_of(error)
        await context.abort(code_of(error), status.message, ((DETAILS_METADATA_KEY, status.SerializeToString()),))
    logger.error("unexpected error", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has more")
    raise AssertionError("abort returned")


def _tolerant(deserialize: Callable[[bytes], Message] | None) -> Callable[[bytes], Message | _Undecodable] | None:
    if deserialize is None:
        return None

    def tolerant(data: bytes) -> Message | _Undecodable:
        try:
            return deserialize(data)
        except DecodeError:
            owner = getattr(deserialize, "__self__", None)
            return _Undecodable(owner.DESCRIPTOR.name if owner is not None else "message of this method")

    return tolerant


def _checked(request: Any) -> Any:
    if isinstance(request, _Undecodable):
        raise InvalidRequest(FieldViolation("", f"the bytes are no {request.message_name}"))
    return request


async def _all_checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def _wrap_unary(behavior: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def unary(request: Any, context: Any) -> Any:
        try:
            return await behavior(_checked(request), context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            await abort_with(context, error)

    return unary


def _wrap_streaming(behavior: Callable[..., Any], check: Callable[[Any], Any]) -> Callable[..., Any]:
    """For methods that stream their responses. check: what a request, or a stream of them, goes through."""

    async def streaming(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async with aclosing(behavior(check(request), context)) as responses:
                async for response in responses:
                    yield response
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            await abort_with(context, error)

    return streaming
