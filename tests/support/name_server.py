"""A DNS server that knows one address, for every name, or none."""

import socket
import struct
import threading
from types import TracebackType

HEADER = struct.Struct(">HHHHHH")
TYPE_A = 1
NO_ERROR, NO_SUCH_NAME = 0x8180, 0x8183


class NameServer:
    """As a context manager, it answers in a thread."""

    def __init__(self) -> None:
        self.address: str | None = None
        """An IPv4 address, or None if the name doesn't exist."""
        self.num_questions = 0
        """How often an IPv4 address was asked for."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._answer_all)

    def target(self, port: int) -> str:
        """A gRPC target: the port at the address that this server gives."""
        return f"dns://127.0.0.1:{self._socket.getsockname()[1]}/worker.test:{port}"

    def __enter__(self) -> "NameServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def _answer_all(self) -> None:
        while True:
            query, peer = self._socket.recvfrom(512)
            if not query:
                return
            name_end = query.index(b"\0", HEADER.size) + 1
            question = query[HEADER.size : name_end + 4]
            is_address = struct.unpack(">H", query[name_end : name_end + 2])[0] == TYPE_A
            self.num_questions += is_address
            answer = b""
            if is_address and self.address is not None:
                answer = b"\xc0\x0c" + struct.pack(">HHIH", TYPE_A, 1, 0, 4) + socket.inet_aton(self.address)
            status = NO_SUCH_NAME if self.address is None else NO_ERROR
            header = HEADER.pack(struct.unpack(">H", query[:2])[0], status, 1, bool(answer), 0, 0)
            self._socket.sendto(header + question + answer, peer)
