"""tandem-gateway: the HTTP gateway as one process, or as several that share a port."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tandem_gateway.tls import reloaded_context
from tandem_shared.config import read_command_line
from tandem_shared.errors import ConfigError
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.host.log import configure_logging
from tandem_shared.options import flag_of
from tandem_shared.rpc.api_keys import KeyFile

FILES = (
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "scheduler_ca",
    "scheduler_tls_cert",
    "scheduler_tls_key",
    "api_key_file",
)


def main(arguments: Sequence[str] | None = None) -> None:
    settings = read_command_line(
        GatewaySettings,
        "tandem-gateway",
        "Serves OpenAI's HTTP API over a scheduler service.",
        arguments,
        extra="gateway",
    )
    configure_logging(settings.log_level, settings.log_format, "gateway")
    # Imported once the packages of the extra are known to be there. gRPC looks at its import at what it may log.
    from tandem_gateway.server import serve

    try:
        _check_files(settings)
        serve(settings)
    except ConfigError as error:
        print(f"tandem-gateway: {error}", file=sys.stderr)
        sys.exit(2)


def _check_files(settings: GatewaySettings) -> None:
    """Raises ConfigError for a file that is not there or is wrong, before a process is started that needs it."""
    for name in FILES:
        path = getattr(settings, name)
        if path and not Path(path).is_file():
            raise ConfigError(f"{flag_of(name)}: {path} is no file")
    if settings.api_key_file:
        KeyFile(settings.api_key_file)
    if settings.tls_cert:
        reloaded_context(settings)


if __name__ == "__main__":
    main()
