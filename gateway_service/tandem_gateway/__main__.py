"""tandem-gateway: the HTTP gateway as one process, or as several that share a port."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.errors import ConfigError
from tandem_shared.extras import require_extra
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.host.log import configure_logging
from tandem_shared.options import add_options, read_settings, refuse_unknown_variables


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tandem-gateway", description="Serves OpenAI's HTTP API over a scheduler service.", allow_abbrev=False
    )
    add_options(parser, GatewaySettings)
    namespace = parser.parse_args(arguments)
    try:
        refuse_unknown_variables(os.environ, (SchedulerSettings, WorkerSettings, GatewaySettings))
        settings = read_settings(GatewaySettings, namespace, os.environ)
        _check(settings)
        require_extra("gateway")
        configure_logging(settings.log_level)
        # Imported once the packages of the extra are known to be there.
        from tandem_gateway.server import serve

        serve(settings)
    except ConfigError as error:
        print(f"tandem-gateway: {error}", file=sys.stderr)
        sys.exit(2)


def _check(settings: GatewaySettings) -> None:
    """Raises ConfigError if one of several settings that need each other is missing."""
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("--tls-cert and --tls-key go together")
    if settings.tls_client_ca and not settings.tls_cert:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    if bool(settings.scheduler_tls_cert) != bool(settings.scheduler_tls_key):
        raise ConfigError("--scheduler-tls-cert and --scheduler-tls-key go together")
    if settings.scheduler_tls_cert and not settings.scheduler_ca:
        raise ConfigError("--scheduler-tls-cert needs --scheduler-ca")
    for name in ("tls_cert", "tls_key", "tls_client_ca", "scheduler_ca", "scheduler_tls_cert", "scheduler_tls_key"):
        path = getattr(settings, name)
        if path and not Path(path).is_file():
            raise ConfigError(f"--{name.replace('_', '-')}: {path} is no file")


if __name__ == "__main__":
    main()
