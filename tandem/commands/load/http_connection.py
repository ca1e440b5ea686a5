"""HTTP requests whose answers are streams, for a load generator, which must take little CPU time while they come:
httptools parses, and each part is kept with its time.

Connections are kept for the next request where the server allows it. Nothing is followed, decompressed or sent through
a proxy.
"""

import asyncio
import ssl
import time
from typing import cast
from urllib.parse import urlsplit

import httptools

from tandem.commands.load.target import Received, RequestFailed

CONNECT_TIMEOUT_S = 10.0
SHOWN_CHARACTERS = 300
"""How much of an error's body is shown."""
OK = 200


class HttpConnections:
    """One client process's connections to a server."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        """url: what all requests are posted to."""
        parts = urlsplit(url)
        is_tls = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if is_tls else 80)
        self._tls = ssl.create_default_context() if is_tls else None
        lines = [f"POST {parts.path} HTTP/1.1", f"host: {parts.netloc.rpartition('@')[2]}"]
        self._head = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items())]).encode()
        self.idle: list[_Exchange] = []

    async def stream(self, request: bytes) -> Received:
        """Posts a body and reads the whole answer. Raises RequestFailed."""
        sent = time.monotonic()
        exchange = await self._connection()
        received = Received(sent, [], [])
        head = self._head + f"\r\ncontent-length: {len(request)}\r\n\r\n".encode()
        status = await exchange.send(head + request, received)
        if exchange.may_be_used_again:
            self.idle.append(exchange)
        if status != OK:
            text = b"".join(received.parts).decode(errors="replace")
            raise RequestFailed(f"HTTP {status}: {text[:SHOWN_CHARACTERS]}")
        return received

    def close(self) -> None:
        for exchange in self.idle:
            exchange.close()

    async def _connection(self) -> "_Exchange":
        while self.idle:
            if (exchange := self.idle.pop()).may_be_used_again:
                return exchange
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, made = await loop.create_connection(_Exchange, self._host, self._port, ssl=self._tls)
        except TimeoutError:
            raise RequestFailed(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        return made


class _Exchange(asyncio.Protocol):
    """A connection, which has one request at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's class.
        self._transport = cast(asyncio.Transport, transport)
        self.may_be_used_again = True
        self._ended: asyncio.Future[int] | None = None

    async def send(self, request: bytes, received: Received) -> int:
        """Fills in the answer's parts as they come. Returns its status once it is complete. Raises RequestFailed."""
        self._received = received
        self._parser = httptools.HttpResponseParser(self)
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._ended

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._ended is None or self._ended.done():
            self._give_up("the server sent what nobody asked for")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._give_up(f"the answer is no HTTP: {error}")

    def on_body(self, part: bytes) -> None:
        self._received.times.append(time.monotonic())
        self._received.parts.append(part)

    def on_message_complete(self) -> None:
        self.may_be_used_again = self._parser.should_keep_alive()
        if not self.may_be_used_again:
            self._transport.close()
        self._end()

    def connection_lost(self, error: Exception | None) -> None:
        self.may_be_used_again = False
        # An answer without a length ends with its connection.
        if error is None and self._ended is not None and not self._ended.done() and self._parser.get_status_code():
            self._end()
        else:
            self._give_up(f"the connection was lost: {error or 'closed by the server'}")

    def _end(self) -> None:
        assert self._ended is not None
        if not self._ended.done():
            self._ended.set_result(self._parser.get_status_code())

    def _give_up(self, reason: str) -> None:
        self.may_be_used_again = False
        self._transport.close()
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(RequestFailed(reason))
