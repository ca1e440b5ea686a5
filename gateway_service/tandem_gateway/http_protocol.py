"""uvicorn's HTTP protocol over httptools, with a bound on what the parser keeps until a head is complete, and with errors
in OpenAI's form for what is no HTTP.
"""

import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tandem_gateway.errors import ApiError, error_body

CLOSING_HEAD = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
MAX_HEAD_BYTES = 65536
"""The most bytes of a request's head, or between two parts of its body."""


class BoundedProtocol(HttpToolsProtocol):
    """Answers 400, and closes the connection, once more bytes than that came without completing anything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_kept = 0
        self._is_spoilt = False

    def data_received(self, data: bytes) -> None:
        if self._is_spoilt:
            return
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

    def on_headers_complete(self) -> None:
        self._num_kept = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_kept = 0
        super().on_message_complete()
