"""uvicorn's HTTP protocol over httptools, with a bound on what the parser keeps until a head is complete."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65536
"""The most bytes of a request's head, or between two parts of its body."""


class BoundedProtocol(HttpToolsProtocol):
    """Answers 400, and closes the connection, once more bytes than that came without completing anything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_kept = 0

    def data_received(self, data: bytes) -> None:
        self._num_kept += len(data)
        super().data_received(data)
        if self._num_kept > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self) -> None:
        self._num_kept = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_kept = 0
        super().on_message_complete()
