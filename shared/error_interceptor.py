"""The way of every call into the server: a place at the gate, then its request read and parsed, then its method.

Errors leave here and nowhere else, as gRPC statuses with google.rpc details. gRPC is told that each method takes a
stream of bytes. So a call that is refused a place was neither read nor parsed, and bytes that are no message are an
error like any other; in gRPC's own deserialiser they would end INTERNAL.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from shared.call_gate import CallGate
from shared.errors import FieldViolation, InvalidRequest, TandemError
from shared.rich_status import DETAILS_METADATA_KEY, code_of, status_of

logger = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Metadata = tuple[tuple[str, bytes], ...]
Parse = Callable[[bytes], Any]
ReadRequest = Callable[[AsyncIterator[bytes]], Awaitable[Any]]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps TandemError to its status, bytes that are no message to INVALID_ARGUMENT, and our bugs to INTERNAL."""

    def __init__(self, gate: CallGate | None = None) -> None:
        self._gate = gate or CallGate()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        read = _read_stream if handler.request_streaming else _read_one
        read_request = read(handler.request_deserializer or bytes)
        behavior = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        if not handler.response_streaming:
            make, wrapped = grpc.stream_unary_rpc_method_handler, self._wrap_awaited(behavior, read_request)
        elif inspect.isasyncgenfunction(behavior):
            make, wrapped = grpc.stream_stream_rpc_method_handler, self._wrap_generator(behavior, read_request)
        else:
            # It writes its responses to the context, as the standard health service's Watch does.
            make, wrapped = grpc.stream_stream_rpc_method_handler, self._wrap_awaited(behavior, read_request)
        return make(wrapped, None, handler.response_serializer)

    def _wrap_awaited(self, behavior: Callable[..., Awaitable[Any]], read_request: ReadRequest) -> Callable[..., Any]:
        async def awaited(requests: AsyncIterator[bytes], context: Context) -> Any:
            try:
                with self._gate.pass_through(context.peer()):
                    return await behavior(await read_request(requests), context)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                end = _end_of(error)
            await context.abort(*end)

        return awaited

    def _wrap_generator(self, behavior: Callable[..., Any], read_request: ReadRequest) -> Callable[..., Any]:
        async def generator(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            try:
                with self._gate.pass_through(context.peer()):
                    async with aclosing(behavior(await read_request(requests), context)) as responses:
                        async for response in responses:
                            yield response
                return
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                end = _end_of(error)
            await context.abort(*end)

        return generator


def _end_of(error: Exception) -> tuple[grpc.StatusCode, str, Metadata]:
    """What to abort a call with once the error is forgotten.

    gRPC's state of a call and the exception of its abort refer to each other. An error in between, whose traceback has
    the request, would stay until cycles are collected.
    """
    if isinstance(error, TandemError):
        status = status_of(error)
        return code_of(error), status.message, ((DETAILS_METADATA_KEY, status.SerializeToString()),)
    logger.error("unexpected error", exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error; the server's log has more", ()


def _read_one(parse: Parse) -> ReadRequest:
    async def read_one(requests: AsyncIterator[bytes]) -> Any:
        async for data in requests:
            return _parsed(parse, data)
        raise InvalidRequest(FieldViolation("", "the call ended before its request"))

    return read_one


def _read_stream(parse: Parse) -> ReadRequest:
    async def parsed(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in requests:
            yield _parsed(parse, data)

    async def read_stream(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        return parsed(requests)

    return read_stream


def _parsed(parse: Parse, data: bytes) -> Any:
    try:
        return parse(data)
    except DecodeError:
        owner = getattr(parse, "__self__", None)
        name = owner.DESCRIPTOR.name if owner is not None else "message of this method"
        raise InvalidRequest(FieldViolation("", f"the bytes are no {name}")) from None
