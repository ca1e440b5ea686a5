"""The gRPC server that both services run in: health, reflection, channelz, TLS, errors, signals.

Knows nothing of what the services do. Liveness is the health of the empty service name: SERVING while the process
lives. Readiness is the health of each service's own name.
"""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared.config import ServiceSettings
from shared.error_interceptor import ErrorInterceptor
from shared.errors import ConfigError
from shared.grpc_options import SERVER_OPTIONS, SHARED_PORT_OPTIONS

logger = logging.getLogger(__name__)

ServingStatus = health_pb2.HealthCheckResponse.ServingStatus
Register = Callable[[grpc.aio.Server], None]


class Server:
    """A server of some services, not ready until told so."""

    def __init__(
        self,
        services: dict[str, Register],
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        credentials: grpc.ServerCredentials | None = None,
        shares_port: bool = False,
    ) -> None:
        """services: full name -> what adds its servicer to a server. Interceptors run inside the error mapping.
        shares_port: other servers listen where this one does, and the system deals out the connections.
        """
        self._services = tuple(services)
        self._credentials = credentials
        options = SHARED_PORT_OPTIONS if shares_port else SERVER_OPTIONS
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor(), *interceptors], options=options)
        for register in services.values():
            register(self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        channelz.add_channelz_servicer(self._server)
        names = [
            *services,
            health.SERVICE_NAME,
            channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name,
            reflection.SERVICE_NAME,
        ]
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listens; gives the port. ConfigError where the address can't be had."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise ConfigError(f"can't listen on {address}: {error}") from error
        await self._health.set("", ServingStatus.SERVING)
        await self.set_ready(self._services, False)
        # What start-up made stays: collections, which hold up all threads, need not look at it again.
        gc.freeze()
        await self._server.start()
        logger.info("listening on %s:%d%s", host, bound, " with TLS" if self._credentials else "")
        return bound

    async def set_ready(self, services: Iterable[str], is_ready: bool) -> None:
        for service in services:
            await self._health.set(service, ServingStatus.SERVING if is_ready else ServingStatus.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls; those that run have grace_s to end."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def server_credentials(settings: ServiceSettings) -> grpc.ServerCredentials | None:
    """TLS as the settings say, or None. With a client authority, clients must show a certificate of it."""
    if not settings.tls_cert:
        return None
    pair = (read_pem("--tls-key", settings.tls_key), read_pem("--tls-cert", settings.tls_cert))
    client_ca = read_pem("--tls-client-ca", settings.tls_client_ca) if settings.tls_client_ca else None
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def read_pem(flag: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag}: {error}") from error


def write_port_file(path: str, port: int) -> None:
    """Whole or not at all, for whoever waits for it."""
    if path:
        partial = Path(f"{path}.{os.getpid()}")
        partial.write_text(f"{port}\n")
        partial.replace(path)


class StopSignals:
    """SIGTERM and SIGINT of this process: the first asks for an orderly end, a second for one at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()
