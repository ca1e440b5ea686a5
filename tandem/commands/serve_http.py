"""What `tandem serve` decides about its HTTP gateway: whether there is one, and on which port."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping

from tandem.commands.service_flags import is_taken, refuse_taken_port
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.errors import ConfigError
from tandem_shared.extras import require_extra
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.options import Given, add_options, read_settings, variable_of

NOT_FOR_SERVE = ("scheduler_address", "scheduler_ca", "scheduler_tls_cert", "scheduler_tls_key")
"""Settings of a gateway that stands alone. Here the scheduler is beside it."""

PRIVATE = ("tls_cert", "tls_key", "tls_client_ca", "port_file")
"""Settings that are meant for the scheduler."""


def add_http_flags(parser: argparse.ArgumentParser) -> None:
    """The gateway's flags, beside those of the services, which share some with it."""
    shared = {field.name for each in (SchedulerSettings, WorkerSettings) for field in dataclasses.fields(each)}
    add_options(parser, GatewaySettings, without=(*NOT_FOR_SERVE, *shared))


def read_http_flags(
    options: argparse.Namespace,
    environment: Mapping[str, str],
    scheduler: SchedulerSettings,
    file: Mapping[str, Given] | None = None,
) -> GatewaySettings | None:
    """The gateway's settings, or None if there is to be none. file: what a file says of settings. Raises ConfigError.

    A gateway that nobody asked for must not keep the services from starting. So if its port is taken it gets another
    one, and if it can't be at all it is left out; both with a warning on stderr.
    """
    file = file or {}
    ours = {name: value for name, value in vars(options).items() if name not in (*PRIVATE, *NOT_FOR_SERVE)}
    hidden = {variable_of(name) for name in (*PRIVATE, *NOT_FOR_SERVE)}
    settings = read_settings(
        GatewaySettings,
        argparse.Namespace(**ours),
        {name: value for name, value in environment.items() if name not in hidden},
        {name: value for name, value in file.items() if name not in PRIVATE},
    )
    if not settings.http_port:
        return None
    is_wanted = options.http_port is not None or bool(environment.get(variable_of("http_port"))) or "http_port" in file
    try:
        require_extra("gateway")
        if scheduler.tls_cert:
            raise ConfigError("with --tls-cert, run tandem-gateway beside tandem serve, with certificates of its own")
    except ConfigError as error:
        if is_wanted:
            raise
        print(f"tandem serve: no HTTP: {error}", file=sys.stderr)
        return None
    if is_wanted:
        refuse_taken_port("--http-port", settings.host, settings.http_port)
    elif is_taken(settings.host, settings.http_port):
        print(f"tandem serve: port {settings.http_port} is taken, so HTTP gets a free one", file=sys.stderr)
        return dataclasses.replace(settings, http_port=0)
    return settings
