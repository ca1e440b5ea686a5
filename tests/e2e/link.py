"""A TCP link through this process. It can fall silent, so that nothing passes and nothing is closed, and it can be cut,
so that its connections are reset.
"""

import contextlib
import socket
import struct
import threading
import time

CHUNK_BYTES = 1 << 16
RESET_AT_CLOSE = struct.pack("ii", 1, 0)
"""A struct linger with no time to linger: close() then resets the connection."""


class Link:
    """Forwards connections to a port of this machine. While it is silent it reads and writes nothing, on old and new
    connections alike.
    """

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._is_open.set()
        self._listeners: list[socket.socket] = []
        self._connections: list[socket.socket] = []

    def listen(self, port: int) -> str:
        """Listens on a free port; returns the address, which leads to `port`."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener, port), daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def fall_silent(self) -> None:
        self._is_open.clear()

    def recover(self) -> None:
        self._is_open.set()

    def stall(self, duration_s: float) -> None:
        self.fall_silent()
        time.sleep(duration_s)
        self.recover()

    def cut(self) -> None:
        """Resets all open connections, on both sides."""
        connections, self._connections = self._connections, []
        for each in connections:
            # Connections that have ended are still in the list.
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                # Wakes the thread that reads the socket, and sends the other side nothing.
                each.shutdown(socket.SHUT_RD)
            each.close()

    def close(self) -> None:
        self._is_open.set()
        for each in [*self._listeners, *self._connections]:
            # Also wakes the thread that waits for the socket.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self, listener: socket.socket, port: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = listener.accept()
                self._is_open.wait()
                try:
                    there = socket.create_connection(("127.0.0.1", port))
                except OSError:
                    # Nobody listens there: the client sees its connection closed.
                    here.close()
                    continue
                self._connections += [here, there]
                for source, target in ((here, there), (there, here)):
                    threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                self._is_open.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
