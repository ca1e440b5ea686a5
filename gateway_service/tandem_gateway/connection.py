"""What the gateway does for every HTTP request, as ASGI middleware: bounds its body in size and time, gives it an id,
and answers with that id. Also the answers that are streams, and the wait for an answer whose client may go away.
"""

import asyncio
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem_gateway.engine import Metadata
from tandem_gateway.errors import ApiError, ClientGone, error_body, error_response
from tandem_gateway.events import DONE, event
from tandem_gateway.traces import trace_metadata
from tandem_shared.errors import TandemError
from tandem_shared.rpc.api_keys import KeyFile
from tandem_shared.rpc.api_keys import Scope as KeyScope

REQUEST_ID = b"x-request-id"
MAX_KEY_BYTES = 6 * 1024
"""gRPC takes metadata of up to 8 KiB, of which the rest is for names, the trace, and gRPC's own."""
SCOPES: dict[str, KeyScope | None] = {"/": None, "/health": None, "/version": None, "/metrics": KeyScope.CONTROL}
"""What a key must be for to ask for a path: inference, unless it is here. Paths with None are for anybody, and say
nothing of the model's users.
"""

T = TypeVar("T")


class BoundedRequests:
    """Refuses requests without the right key (401, 403), if there are keys, and bodies that are too large (413)
    or too slow (408); and sets x-request-id of the answer.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile | None, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(REQUEST_ID) or uuid.uuid4().hex.encode()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id.decode("latin-1")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, request_id)]
            await send(message)

        try:
            self._check_key(scope)
            body = await self._read(headers, receive)
        except (ApiError, TandemError) as error:
            answer = error_response(error)
            # What was not read of the body must not be taken for the next request.
            answer.headers["connection"] = "close"
            await answer(scope, receive, send_with_id)
            return
        is_read = False

        async def receive_body() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_body, send_with_id)

    def _check_key(self, scope: Scope) -> None:
        # The pattern of a route also fits a path with a line break behind it.
        needed = SCOPES.get(scope["path"].removesuffix("\n"), KeyScope.INFERENCE)
        if self._keys is not None and needed is not None:
            values = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
            self._keys.find(values).check_scope(needed)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises ApiError."""
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._max_body_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._body_timeout_s:g} s") from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body_bytes} bytes")


class EventStream(StreamingResponse):
    """Server-sent events. However the answer ends, `cancel` is called, which aborts what still runs."""

    def __init__(self, events: AsyncIterator[bytes], cancel: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()


async def events_or_error(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events and, where they end with an error, that error as the last one but DONE, which ends every stream."""
    try:
        async for each in events:
            yield each
    except Exception as error:
        yield event(error_body(error))
    yield DONE


async def with_first(items: AsyncIterable[T], request: Request, cancel: Callable[[], None]) -> AsyncIterator[T]:
    """Waits for the first item, so that an error before it becomes the answer's status, and returns all items."""
    iterator = aiter(items)
    try:
        first = await while_connected(request, anext(iterator))
    except BaseException:
        cancel()
        raise
    return _chained(first, iterator)


async def _chained(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for each in rest:
        yield each


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What `work` returns. Raises ClientGone, and cancels the work, if the client closes the connection before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def metadata_of(request: Request) -> Metadata:
    """What is passed on to the scheduler, which checks keys too. Raises ApiError for a header that can't be."""
    trace = trace_metadata(request.headers)
    values = request.headers.getlist("authorization")
    if not values:
        return trace
    value = values[0]
    if not (len(values) == 1 and value.isascii() and value.isprintable() and len(value) <= MAX_KEY_BYTES):
        message = f"the header Authorization must be there once, and printable ASCII of at most {MAX_KEY_BYTES} bytes"
        raise ApiError(401, message, code="invalid_api_key")
    return (("authorization", value), *trace)


def request_id_of(request: Request) -> str:
    return str(request.state.request_id)
