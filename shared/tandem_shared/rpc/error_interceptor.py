"""What every call to a server goes through: it gets a place (call_gate.py), its request is read (read_gate.py) and
parsed, its method runs, and its errors become gRPC statuses with google.rpc details. Errors become statuses nowhere
else.

gRPC is told that each method takes a stream of bytes. So the request of a call that gets no place is neither read nor
parsed, and bytes that are not a message are an invalid request; gRPC's own deserialiser would end the call INTERNAL.
Nor is the request of a call that an interceptor refuses.

Calls whose requests are small, such as those of the health service, have places and limits of their own: they are still
answered by a server that is full of other calls, and their messages are decoded only if they are small.
"""

import asyncio
import functools
import inspect
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from tandem_shared.errors import FieldViolation, InvalidRequest, TandemError
from tandem_shared.rpc.call_gate import CallGate
from tandem_shared.rpc.read_gate import ReadGate
from tandem_shared.rpc.rich_status import DETAILS_METADATA_KEY, code_of, status_of

logger = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Metadata = tuple[tuple[str, bytes], ...]
End = tuple[grpc.StatusCode, str, Metadata]
Parse = Callable[[bytes], Any]
ReadRequest = Callable[[AsyncIterator[bytes], str], Awaitable[Any]]
OnRefusal = Callable[[Exception], None]


@dataclass(frozen=True)
class CallLimits:
    """The limits that some of a server's calls share."""

    calls: CallGate = field(default_factory=CallGate)
    reads: ReadGate = field(default_factory=ReadGate)
    max_request_bytes: int = sys.maxsize
    bounds_each_message: bool = False
    """Whether each message of a stream must arrive in time and in its turn, or only the first. A trusted stream may be
    silent for long."""


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps TandemErrors to their statuses, bytes that are not a message to INVALID_ARGUMENT, and bugs to INTERNAL."""

    def __init__(
        self,
        limits: CallLimits | None = None,
        small_limits: CallLimits | None = None,
        small_calls: Collection[str] = (),
        on_refusal: Callable[[str, Exception], None] = lambda method, error: None,
    ) -> None:
        """small_calls: the full names of the services, or of methods as SERVICE/METHOD, that small_limits are for.
        on_refusal is called with SERVICE/METHOD and the error of a call that ends before its method runs.
        """
        self._on_refusal = on_refusal
        self._limits = limits or CallLimits()
        self._small_limits = small_limits or self._limits
        self._small_calls = frozenset(small_calls)
        self.calls: set[asyncio.Task[Any]] = set()
        """The tasks of the open calls. A task ends when the status of its call has been sent."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        call = asyncio.current_task()
        assert call is not None, "gRPC runs each call in a task of its own"
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)
        method = handler_call_details.method.removeprefix("/")
        on_refusal = functools.partial(self._on_refusal, method)
        try:
            handler: Any = await continuation(handler_call_details)
        except Exception as error:
            on_refusal(error)
            return grpc.stream_unary_rpc_method_handler(_refuse_with(_end_of(error)))
        if handler is None:
            return None
        read = _read_stream if handler.request_streaming else _read_one
        is_small = not self._small_calls.isdisjoint((method, method.rpartition("/")[0]))
        limits = self._small_limits if is_small else self._limits
        read_request = read(handler.request_deserializer or bytes, limits)
        behavior = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        if not handler.response_streaming:
            make, wrap = grpc.stream_unary_rpc_method_handler, _wrap_awaited
        elif inspect.isasyncgenfunction(behavior):
            make, wrap = grpc.stream_stream_rpc_method_handler, _wrap_generator
        else:
            # The method writes its responses to the context, as the standard health service's Watch does.
            make, wrap = grpc.stream_stream_rpc_method_handler, _wrap_awaited
        return make(wrap(behavior, read_request, limits, on_refusal), None, handler.response_serializer)


def _refuse_with(end: End) -> Callable[..., Awaitable[None]]:
    async def refuse(requests: AsyncIterator[bytes], context: Context) -> None:
        await _abort(context, end)

    return refuse


class _Reading:
    """The reading of a call's request, of which nothing else may keep the request (_end_of)."""

    def __init__(self, read_request: ReadRequest) -> None:
        self.is_done = False
        self._read_request = read_request

    async def read(self, requests: AsyncIterator[bytes], peer: str) -> Any:
        request = await self._read_request(requests, peer)
        self.is_done = True
        return request


def _wrap_awaited(
    behavior: Callable[..., Awaitable[Any]], read_request: ReadRequest, limits: CallLimits, on_refusal: OnRefusal
) -> Callable[..., Any]:
    async def awaited(requests: AsyncIterator[bytes], context: Context) -> Any:
        reading = _Reading(read_request)
        try:
            with limits.calls.pass_through(context.peer(), if_full=limits.reads.hurry_oldest):
                return await behavior(await reading.read(requests, context.peer()), context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            if not reading.is_done:
                on_refusal(error)
            end = _end_of(error)
        await _abort(context, end)

    return awaited


def _wrap_generator(
    behavior: Callable[..., Any], read_request: ReadRequest, limits: CallLimits, on_refusal: OnRefusal
) -> Callable[..., Any]:
    async def generator(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        reading = _Reading(read_request)
        try:
            with limits.calls.pass_through(context.peer(), if_full=limits.reads.hurry_oldest):
                async with aclosing(behavior(await reading.read(requests, context.peer()), context)) as responses:
                    async for response in responses:
                        yield response
            return
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            if not reading.is_done:
                on_refusal(error)
            end = _end_of(error)
        await _abort(context, end)

    return generator


async def _abort(context: Context, end: End) -> None:
    """Ends the call by raising. If gRPC has ended the call already but has not told Python yet, raises CancelledError,
    as in a cancelled call. This happens when a deadline passes, which the scheduler notices at the same moment as gRPC.
    """
    try:
        await context.abort(*end)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def _end_of(error: Exception) -> End:
    """The status, text and metadata to abort the call with.

    The error itself must not be referred to when the call is aborted. gRPC's state of a call and the exception of its
    abort refer to each other, so the error, whose traceback holds the request, would stay in memory until the garbage
    collector finds the cycle.
    """
    if isinstance(error, TandemError):
        status = status_of(error)
        return code_of(error), status.message, ((DETAILS_METADATA_KEY, status.SerializeToString()),)
    logger.error("unexpected error", exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error; the server's log has more", ()


def _read_one(parse: Parse, limits: CallLimits) -> ReadRequest:
    async def read_one(requests: AsyncIterator[bytes], peer: str) -> Any:
        data = await limits.reads.read(peer, requests)
        if data is None:
            raise InvalidRequest(FieldViolation("", "the call ended before its request"))
        return _parsed(parse, data, limits)

    return read_one


def _read_stream(parse: Parse, limits: CallLimits) -> ReadRequest:
    async def parsed(requests: AsyncIterator[bytes], peer: str) -> AsyncIterator[Any]:
        data = await limits.reads.read(peer, requests)
        while data is not None:
            yield _parsed(parse, data, limits)
            data = await (limits.reads.read(peer, requests) if limits.bounds_each_message else anext(requests, None))

    async def read_stream(requests: AsyncIterator[bytes], peer: str) -> AsyncIterator[Any]:
        return parsed(requests, peer)

    return read_stream


def _parsed(parse: Parse, data: bytes, limits: CallLimits) -> Any:
    if len(data) > limits.max_request_bytes:
        raise InvalidRequest(FieldViolation("", f"has more than {limits.max_request_bytes} bytes"))
    try:
        return parse(data)
    except DecodeError:
        owner = getattr(parse, "__self__", None)
        of_type = f"of type {owner.DESCRIPTOR.name}" if owner is not None else "of this method"
        raise InvalidRequest(FieldViolation("", f"the bytes are not a message {of_type}")) from None
