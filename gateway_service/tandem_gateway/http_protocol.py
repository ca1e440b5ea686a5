"""uvicorn's HTTP protocol over httptools, where it does not do what the gateway promises.

What the parser keeps until a head is complete is bounded. What is no HTTP is answered by an error in OpenAI's form.
A request that asks to upgrade the connection is served as if it had not, as it may have a body: Java's HttpClient asks
for HTTP/2 so. httptools stops at the end of such a head, so another parser goes on with the body (_Parser). And a
request that runs learns that its connection is lost also if another one waits behind it; uvicorn tells only that one.
"""

import json
import logging
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tandem_gateway.errors import ApiError, error_body

MAX_HEAD_BYTES = 65536
"""The most bytes of a request's head, or between two parts of its body."""

CLOSING_HEAD = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
FRAMING = (b"content-length", b"transfer-encoding")
"""The headers that say where a body ends."""

logger = logging.getLogger("uvicorn.error.requests")
logger.setLevel(logging.ERROR)
"""uvicorn's logger for requests. It warns of each that is no HTTP, which anybody can send, and whose sender is told."""


class BoundedProtocol(HttpToolsProtocol):
    """Answers 400, and closes the connection, once more than MAX_HEAD_BYTES came without completing anything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = logger
        self.parser = _Parser(self)
        self._num_kept = 0
        self._is_spoilt = False
        self._unparsed = b""
        self._is_head_known = False
        self._running: RequestResponseCycle | None = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._unparsed = data
        while self._unparsed and not self._is_spoilt:
            data, self._unparsed = self._unparsed, b""
            self._num_kept += len(data)
            super().data_received(data)
            if self._num_kept > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that can't be parsed, and closes the connection. Whole requests before them are answered first,
        after which the connection closes without a word.
        """
        self._is_spoilt = True
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or (is_answering and not self.cycle.more_body):
            self.cycle.keep_alive = False
            return
        if not (is_answering and self.cycle.response_started):
            body = json.dumps(error_body(ApiError(400, msg))).encode()
            self.transport.write(CLOSING_HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        self.transport.close()

    def go_on_without_upgrade(self, rest: bytes) -> None:
        """Has the rest, which follows a head that asked for an upgrade, parsed as its body and what comes behind."""
        framing = b"".join(name + b": " + value + b"\r\n" for name, value in self.headers if name in FRAMING)
        self.parser = _Parser(self)
        self._is_head_known = True
        self._unparsed = b"POST / HTTP/1.1\r\n" + framing + b"\r\n" + rest

    def on_message_begin(self) -> None:
        if not self._is_head_known:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._is_head_known:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_head_known:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_kept = 0
        if not self._is_head_known:
            super().on_headers_complete()
        self._is_head_known = False

    def on_body(self, body: bytes) -> None:
        self._num_kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_kept = 0
        # The end of a head that asks for an upgrade is not the end of its message.
        if not self.parser.should_upgrade():
            super().on_message_complete()


class _Parser(httptools.HttpRequestParser):
    """A parser that has its protocol go on where a request asks for an upgrade."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__(protocol)
        # As in uvicorn, which answers the first request of a pipeline also if it asks to close the connection.
        self.set_dangerous_leniencies(lenient_data_after_close=True)
        self._protocol = protocol

    def feed_data(self, data: Any) -> None:
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._protocol.go_on_without_upgrade(bytes(data[upgrade.args[0] :]))
