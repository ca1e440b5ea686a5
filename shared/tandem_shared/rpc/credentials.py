"""Credentials for TLS, made of the PEM files that flags name, and channels with or without them.

Servers read their files again when these have changed, at the next handshake. A channel's credentials can't change, so
its owner opens another channel.
"""

from pathlib import Path

import grpc

from tandem_shared.config import ServiceSettings
from tandem_shared.errors import ConfigError
from tandem_shared.host.reloaded import Reloaded
from tandem_shared.rpc.grpc_options import Options

Pem = tuple[str, str | None]
"""A flag, and the path that it was given; empty or None if it was not given."""


def channel_credentials(authority: Pem, key: Pem, chain: Pem) -> grpc.ChannelCredentials:
    """The credentials of a client: the authorities that it trusts, those of gRPC if no file is given, and its own
    private key and certificate chain, if it has them. Raises ConfigError, which names the flag, for a file that can't
    be read.
    """
    return grpc.ssl_channel_credentials(
        *(read_pem(flag, path) if path else None for flag, path in (authority, key, chain))
    )


def reloaded_credentials(authority: Pem, key: Pem, chain: Pem) -> Reloaded[grpc.ChannelCredentials]:
    """channel_credentials() of files that may change. Raises ConfigError."""
    return Reloaded(
        [path or "" for _, path in (authority, key, chain)], lambda: channel_credentials(authority, key, chain)
    )


def read_pem(flag: str, path: str) -> bytes:
    """The contents of a PEM file. Raises ConfigError, which names the flag, if it can't be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag}: {error}") from error


def open_channel(address: str, credentials: grpc.ChannelCredentials | None, options: Options) -> grpc.aio.Channel:
    """A channel of the running event loop, without TLS if there are no credentials."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, credentials, options)


def server_credentials(settings: ServiceSettings) -> grpc.ServerCredentials | None:
    """The credentials for TLS as set, or None without TLS. Raises ConfigError if a file can't be read."""
    if not settings.tls_cert:
        return None

    def load() -> grpc.ServerCertificateConfiguration:
        pair = (read_pem("--tls-key", settings.tls_key), read_pem("--tls-cert", settings.tls_cert))
        client_ca = read_pem("--tls-client-ca", settings.tls_client_ca) if settings.tls_client_ca else None
        return grpc.ssl_server_certificate_configuration([pair], client_ca)

    files = Reloaded([settings.tls_key, settings.tls_cert, settings.tls_client_ca], load)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC's threads at each handshake. None leaves the certificates as they are."""
        return files.value if files.refresh() else None

    asks_clients = bool(settings.tls_client_ca)
    # The stubs do not know that None may be returned.
    return grpc.dynamic_ssl_server_credentials(files.value, fetch, asks_clients)  # type: ignore[arg-type]
