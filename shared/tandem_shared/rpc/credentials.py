"""Credentials for TLS, made of the PEM files that flags name, and channels with or without them."""

from pathlib import Path

import grpc

from tandem_shared.errors import ConfigError
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
