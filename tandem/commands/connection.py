"""The flags that say which server a command calls, and the client that they make."""

import argparse
import os

import grpc

from tandem.calls import DEFAULT_MAX_RETRIES, Metadata
from tandem.client import TandemClient
from tandem_shared.errors import ConfigError
from tandem_shared.options import API_KEY_VARIABLE
from tandem_shared.rpc.credentials import channel_credentials

DEFAULT_ADDRESS = "127.0.0.1:50051"


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help=f"HOST:PORT of the server; default {DEFAULT_ADDRESS}")
    parser.add_argument("--tls", action="store_true", help="speak TLS, and trust the authorities that gRPC trusts")
    parser.add_argument("--ca", metavar="FILE", help="speak TLS, and trust the authorities in this PEM file")
    parser.add_argument(
        "--client-cert", metavar="FILE", help="PEM file of the certificate chain that is shown to the server"
    )
    parser.add_argument("--client-key", metavar="FILE", help="PEM file of that certificate's private key")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"API key that is shown to the server; other users of this machine may see it in a flag, but not in the"
        f" environment variable {API_KEY_VARIABLE}",
    )


def connect(options: argparse.Namespace, *, max_retries: int = DEFAULT_MAX_RETRIES) -> TandemClient:
    """A client of the server that the flags name. Raises ConfigError."""
    address, credentials = options.address or DEFAULT_ADDRESS, credentials_of(options)
    return TandemClient(address, credentials, metadata=metadata_of(options), max_retries=max_retries)


def metadata_of(options: argparse.Namespace) -> Metadata:
    """The metadata of every call: the API key, if there is one."""
    key = options.api_key or os.environ.get(API_KEY_VARIABLE)
    return (("authorization", f"Bearer {key}"),) if key else ()


def credentials_of(options: argparse.Namespace) -> grpc.ChannelCredentials | None:
    """The credentials of a connection with TLS, None without. Raises ConfigError for flags that need each other, and
    for files that can't be read.
    """
    if bool(options.client_cert) != bool(options.client_key):
        raise ConfigError("--client-cert and --client-key go together")
    if not (options.tls or options.ca):
        if options.client_cert:
            raise ConfigError("--client-cert needs --tls or --ca")
        return None
    return channel_credentials(
        ("--ca", options.ca), ("--client-key", options.client_key), ("--client-cert", options.client_cert)
    )
