"""The gateway's own TLS, whose files are read again when they have changed."""

import ssl
from typing import Any

from tandem_shared.errors import ConfigError
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.host.reloaded import Reloaded


def reloaded_context(settings: GatewaySettings) -> ssl.SSLContext:
    """A context that gives each handshake to one of the files as they are then. Raises ConfigError for wrong files."""
    paths = [settings.tls_cert, settings.tls_key, settings.tls_client_ca]
    contexts = Reloaded(paths, lambda: _context(settings))

    def choose(connection: Any, server_name: str | None, context: ssl.SSLContext) -> None:
        contexts.refresh()
        connection.context = contexts.value

    # It is called at the start of each handshake, also if the client names no server.
    first = _context(settings)
    first.sni_callback = choose
    return first


def _context(settings: GatewaySettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=settings.tls_client_ca or None)
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except OSError as error:
        raise ConfigError(f"--tls-cert, --tls-key or --tls-client-ca: {error}") from error
    context.verify_mode = ssl.CERT_REQUIRED if settings.tls_client_ca else ssl.CERT_NONE
    return context
