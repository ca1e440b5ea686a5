"""The gRPC server that both services run in, with health, reflection, channelz, TLS, limits, errors and signals.

It knows nothing of what the services do. Liveness is the health of the empty service name, which is SERVING while the
process lives. Readiness is the health of each service's own name.
"""

import asyncio
import gc
import logging
import signal
from collections.abc import Callable, Collection, Iterable, Sequence

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tandem_shared.errors import ConfigError
from tandem_shared.host.process import raise_descriptor_limit
from tandem_shared.rpc.call_gate import CallGate
from tandem_shared.rpc.error_interceptor import CallLimits, ErrorInterceptor
from tandem_shared.rpc.grpc_options import MAX_MESSAGE_BYTES, server_options
from tandem_shared.rpc.read_gate import ReadGate
from tandem_shared.rpc.reflection import SERVICE_NAMES, add_reflection

logger = logging.getLogger(__name__)

RESERVED_DESCRIPTORS = 128
"""File descriptors that connections leave to the process for its own channels, files and libraries."""

DEFAULT_MAX_OPEN_CALLS = 1024

READ_BYTES = 256 * 2**20
"""The memory for requests that are being read. A connection may take an eighth of it."""

MIN_READING, MIN_READING_PER_CONNECTION = 8, 2
"""The least numbers of requests that may be read at once, however large a request may be."""

SMALL_REQUEST_BYTES = 4096
"""The largest request of the health, reflection, channelz and control services, which hold a name or two."""

MAX_SMALL_CALLS, MAX_SMALL_CALLS_PER_CONNECTION = 512, 64
MAX_SMALL_READING, MAX_SMALL_READING_PER_CONNECTION = 16, 4
"""Calls to those services that may be open at once, and that may be read at once. A client that watches health keeps a
call open.
"""

MAX_HEALTH_CONNECTIONS = 64
"""Connections to the health port."""

FLUSH_S = 0.1
"""The time in which what was sent last reaches the clients, before the process ends and its connections with it."""

ServingStatus = health_pb2.HealthCheckResponse.ServingStatus
Register = Callable[[grpc.aio.Server], None]


class Server:
    """A server of some services. They are not ready until set_ready() says so."""

    def __init__(
        self,
        services: dict[str, Register],
        *,
        small_calls: Collection[str] = (),
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        credentials: grpc.ServerCredentials | None = None,
        health_port: int = 0,
        shares_port: bool = False,
        max_request_bytes: int = MAX_MESSAGE_BYTES,
        max_open_calls: int = DEFAULT_MAX_OPEN_CALLS,
        num_unshared_calls: int = 0,
        on_refusal: Callable[[str, Exception], None] = lambda method, error: None,
    ) -> None:
        """services: for each service's full name, the function that adds its servicer to a server. small_calls:
        services, or methods as SERVICE/METHOD, whose requests are all small; like health, they have limits apart from
        the others. interceptors run inside the error mapping. health_port: answers health checks alone, without TLS and
        interceptors, if it is not 0. shares_port: other servers listen on the same ports, and the system distributes
        the connections. max_request_bytes: gRPC refuses larger messages with RESOURCE_EXHAUSTED.
        max_open_calls: further calls are refused with QueueFull, as are those above a connection's share
        (call_gate.py). num_unshared_calls: how many calls one connection may have even if that is above its share.
        on_refusal: is called with SERVICE/METHOD and the error of a call that ends before its method runs.
        """
        self._services = tuple(services)
        self._credentials = credentials
        num_descriptors = raise_descriptor_limit() - (MAX_HEALTH_CONNECTIONS if health_port else 0)
        options = server_options(
            max_request_bytes=max_request_bytes,
            max_open_calls=max_open_calls,
            max_connections=max(num_descriptors - RESERVED_DESCRIPTORS, num_descriptors // 2),
            shares_port=shares_port,
        )
        own_names = [
            health.SERVICE_NAME,
            channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name,
        ]
        self._first = ErrorInterceptor(
            _limits(CallGate(max_open_calls, num_unshared=num_unshared_calls), max_request_bytes),
            _small_limits(),
            [*small_calls, *own_names, *SERVICE_NAMES],
            on_refusal,
        )
        self._server = grpc.aio.server(interceptors=[self._first, *interceptors], options=options)
        for register in services.values():
            register(self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._health_port = health_port
        self._health_server = _create_health_server(self._health, shares_port) if health_port else None
        channelz.add_channelz_servicer(self._server)
        add_reflection([*services, *own_names], self._server)

    async def start(self, host: str, port: int) -> int:
        """Listens and returns the port. Raises ConfigError if the server can't listen on the address."""
        bound = _bind(self._server, host, port, self._credentials)
        if self._health_server is not None:
            _bind(self._health_server, host, self._health_port, None)
        await self._health.set("", ServingStatus.SERVING)
        await self.set_ready(self._services, False)
        # Objects made so far stay for good, so the garbage collector, which stops all threads, need not look at them.
        gc.freeze()
        await self._server.start()
        if self._health_server is not None:
            await self._health_server.start()
        names = ", ".join(self._services)
        logger.info("%s: listening on %s:%d%s", names, host, bound, " with TLS" if self._credentials else "")
        return bound

    async def set_ready(self, services: Iterable[str], is_ready: bool) -> None:
        """Sets the readiness of services, by their full names."""
        for service in services:
            await self._health.set(service, ServingStatus.SERVING if is_ready else ServingStatus.NOT_SERVING)

    async def finish(self, grace_s: float) -> None:
        """Prepares for the end of the process, which must leave() next: running calls have grace_s to end, and new ones
        are still answered. gRPC is not stopped, as it would end calls that arrive meanwhile CANCELLED, which clients
        do not try again; calls that end with the process end UNAVAILABLE.
        """
        await self._health.enter_graceful_shutdown()
        if running := set(self._first.calls):
            await asyncio.wait(running, timeout=grace_s)
        await asyncio.sleep(FLUSH_S)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, and gives running ones grace_s to end. For a process that goes on afterwards; one that
        ends should call finish().
        """
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        if self._health_server is not None:
            await self._health_server.stop(0)


def _create_health_server(servicer: health.aio.HealthServicer, shares_port: bool) -> grpc.aio.Server:
    options = server_options(
        max_request_bytes=SMALL_REQUEST_BYTES,
        max_open_calls=MAX_SMALL_CALLS,
        max_connections=MAX_HEALTH_CONNECTIONS,
        shares_port=shares_port,
    )
    server = grpc.aio.server(interceptors=[ErrorInterceptor(_small_limits())], options=options)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return server


def _bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Returns the port. Raises ConfigError if the server can't listen there."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(f"can't listen on {address}: {error}") from error


def _limits(calls: CallGate, max_request_bytes: int) -> CallLimits:
    max_reading = max(MIN_READING, READ_BYTES // max_request_bytes)
    per_connection = max(MIN_READING_PER_CONNECTION, max_reading // 8)
    return CallLimits(calls, ReadGate(max_reading, per_connection))


def _small_limits() -> CallLimits:
    return CallLimits(
        CallGate(MAX_SMALL_CALLS, max_per_connection=MAX_SMALL_CALLS_PER_CONNECTION),
        ReadGate(MAX_SMALL_READING, MAX_SMALL_READING_PER_CONNECTION),
        SMALL_REQUEST_BYTES,
        bounds_each_message=True,
    )


class StopSignals:
    """Events for SIGTERM and SIGINT: the first signal asks for an orderly end, a second one for an immediate end."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()
