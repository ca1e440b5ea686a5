"""The HTTP server of the gateway, in this process or in several that share a port."""

import contextlib
import functools
import logging
import math
import os
import signal
import socket
import ssl
import sys
from typing import Any, cast

import uvicorn
from uvicorn.supervisors import Multiprocess

from tandem_gateway.app import make_app
from tandem_gateway.http_protocol import BoundedProtocol
from tandem_gateway.metrics import FILES_VARIABLE
from tandem_gateway.tls import reloaded_context
from tandem_shared.errors import ConfigError
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.host.log import configure_logging
from tandem_shared.host.private_folder import PrivateFolder
from tandem_shared.host.process import end_with_parent, raise_descriptor_limit, write_port_file
from tandem_shared.host.shared_port import SharedPort

BACKLOG = 2048
START_LIMIT_S = 60.0
"""How long a process may take until it listens, before the port is told nevertheless."""
KEEP_ALIVE_S = 75
"""How long a connection may be idle between requests: longer than common proxies and clients keep theirs."""


def serve(settings: GatewaySettings) -> None:
    """Serves until a signal says otherwise. Raises ConfigError if the port can't be taken."""
    raise_descriptor_limit()
    config = server_config(settings)
    # uvicorn ends in order at these signals, and then raises them again.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    if settings.http_workers == 1:
        listener = _listen(settings.host, settings.http_port)
        write_port_file(settings.port_file, listener.getsockname()[1])
        uvicorn.Server(config).run([listener])
    else:
        with PrivateFolder() as folder, contextlib.closing(SharedPort(settings.host, settings.http_port)) as shared:
            os.environ[FILES_VARIABLE] = str(folder)
            _Processes(config, settings, shared.port).run()


class _Processes(Multiprocess):
    """Processes that serve the same port, and are started again when they end."""

    def __init__(self, config: uvicorn.Config, settings: GatewaySettings, port: int) -> None:
        # It only hands the sockets on.
        super().__init__(config, cast("list[socket.socket]", [_OwnListener(settings.host, port)]))
        self._settings, self._port = settings, port

    def init_processes(self) -> None:
        super().init_processes()
        for each in self.processes:
            each.wait_until_ready(START_LIMIT_S, self.should_exit)
        write_port_file(self._settings.port_file, self._port)


class _OwnListener:
    """Pickled for a process, this is a listening socket of that process. So the kernel deals out connections evenly; of
    a socket that all accept from, those that come at once go to the first process that wakes.
    """

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(_listen, shares_port=True), self._address


def server_config(settings: GatewaySettings) -> uvicorn.Config:
    """The HTTP server. It can be pickled, as each process loads the application itself."""
    return uvicorn.Config(
        functools.partial(load_app, settings, os.getpid()),
        factory=True,
        loop="uvloop",
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        workers=settings.http_workers,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_grace_s),
        ssl_context_factory=functools.partial(_ssl_context, settings) if settings.tls_cert else None,
    )


def _ssl_context(settings: GatewaySettings, *_: object) -> ssl.SSLContext:
    return reloaded_context(settings)


def load_app(settings: GatewaySettings, main_pid: int) -> object:
    """The application, in the process that serves it: the process main_pid or a child of it, which ends with it."""
    if sys.platform == "linux" and os.getpid() != main_pid:
        end_with_parent(main_pid)
    configure_logging(settings.log_level, settings.log_format, "gateway")
    if settings.log_level == "info":
        # uvicorn says in six lines that it starts and ends.
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return make_app(settings)


def _listen(host: str, port: int, *, shares_port: bool = False) -> socket.socket:
    """Raises ConfigError if the port can't be taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    # Connections that have ended hold up nobody who takes the port after this process.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shares_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(f"can't listen on {host}:{port}: {error.strerror}") from error
    listener.listen(BACKLOG)
    return listener
