"""One port for several servers: taken before any of them listens, and kept while they come and go. Works on Linux
alone.
"""

import socket

from tandem_shared.errors import ConfigError


class SharedPort:
    """Bound sockets that never listen. They hold the port; its connections go to the sockets that listen."""

    def __init__(self, host: str, port: int) -> None:
        """Port 0 takes a free one. Raises ConfigError if the address can't be bound."""
        self._sockets: list[socket.socket] = []
        self.port = port
        try:
            for family, _, _, _, address in socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            ):
                self._hold(family, str(address[0]))
        except OSError as error:
            self.close()
            raise ConfigError(f"can't listen on {host}:{port}: {error}") from error

    def close(self) -> None:
        for each in self._sockets:
            each.close()

    def _hold(self, family: socket.AddressFamily, host: str) -> None:
        if self.port:
            # Binds without sharing first, because a server that is not ours may share the port.
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                _bind(probe, host, self.port)
        holder = socket.socket(family)
        self._sockets.append(holder)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(holder, host, self.port)
        self.port = holder.getsockname()[1]


def _bind(sock: socket.socket, host: str, port: int) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((host, port))
