"""HTTP by hand: bytes to a gateway over a connection of their own, and the replies that come back."""

import contextlib
import io
import json
import socket
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: list[tuple[str, str]]
    """Names are in lower case."""
    body: bytes

    def events(self, **options: Any) -> list[dict[str, Any]]:
        """The events of a stream, but for the last one, which says that it is done. options: of json.loads."""
        lines = [line.removeprefix(b"data: ") for line in self.body.split(b"\n") if line.startswith(b"data: ")]
        return [json.loads(line, **options) for line in lines if line != b"[DONE]"]


class Broken(Exception):
    """A connection that ended, or fell silent, before its reply was whole."""


class Connection:
    """One connection. A context manager."""

    def __init__(self, port: int, timeout_s: float, receive_bytes: int = 0) -> None:
        """receive_bytes: the size of the buffer for what is not read, if it is to be small."""
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(timeout_s)
        self.socket.connect((HOST, port))
        self._file = _Reader(socket.SocketIO(self.socket, "r"))

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """The server may have closed the connection already; its reply is then still to be read."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def read(self, method: str = "POST") -> Reply:
        """The next reply. Raises Broken."""
        response = HTTPResponse(_Socket(self._file), method=method)  # type: ignore[arg-type]
        try:
            response.begin()
            headers = [(name.lower(), value) for name, value in response.getheaders()]
            return Reply(response.status, headers, response.read())
        except (OSError, HTTPException, ValueError) as error:
            raise Broken(repr(error)) from error


class _Reader(io.BufferedReader):
    """Stays open when a reply has been read, as another one may follow."""

    def close(self) -> None:
        pass


class _Socket:
    def __init__(self, file: _Reader) -> None:
        self._file = file

    def makefile(self, *_: object) -> _Reader:
        return self._file


def request(path: str, body: bytes, *, method: str = "POST", headers: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"host: a", b"content-type: application/json"]
    lines += [b"content-length: %d" % len(body), *(name + b": " + value for name, value in headers)]
    return b"\r\n".join([*lines, b"", body])
