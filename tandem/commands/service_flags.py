"""The flags of commands that run the services on this machine: the settings of both."""

import argparse
import os
import socket
from collections.abc import Mapping

from tandem_shared.config import SYNONYMS, SchedulerSettings, WorkerSettings
from tandem_shared.errors import ConfigError
from tandem_shared.options import Given, add_options, option_names, read_settings
from tandem_shared.settings_checks import check_settings

NOT_FOR_USERS = ("model", "port_file", "worker_address", "worker_ca")
PRIVATE = ("host", "port", "port_file", "tls_cert", "tls_key", "tls_client_ca")
"""Settings that are for the scheduler alone. The worker's only client is the scheduler beside it, so the worker takes a
free port and no TLS.
"""


def add_service_flags(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Adds the flags of both services' settings, but for some of them."""
    add_options(parser, SchedulerSettings, WorkerSettings, without=(*NOT_FOR_USERS, *without), synonyms=SYNONYMS)


def read_service_flags(
    options: argparse.Namespace, file: Mapping[str, Given] | None = None
) -> tuple[WorkerSettings, SchedulerSettings]:
    """The settings of a worker, and of a scheduler beside it. options.model is the model. file: what a file says of
    settings. Raises ConfigError.
    """
    file = file or {}
    scheduler = read_settings(SchedulerSettings, options, os.environ, file)
    check_settings(scheduler)
    worker_options = argparse.Namespace(**{k: v for k, v in vars(options).items() if k not in PRIVATE}, port="0")
    environment = {name: value for name, value in os.environ.items() if name not in option_names(PRIVATE)}
    worker_file = {name: value for name, value in file.items() if name not in PRIVATE}
    return read_settings(WorkerSettings, worker_options, environment, worker_file), scheduler


def is_taken(host: str, port: int) -> bool:
    """Whether nobody can listen on a port of this machine now. Never of port 0, which stands for a free one."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError:
        return True
    return False


def refuse_taken_port(flag: str, host: str, port: int) -> None:
    """Raises ConfigError if a flag names a port that is taken, so that it is noticed before a model is loaded."""
    if is_taken(host, port):
        raise ConfigError(f"can't listen on {host}:{port}; is another server there? {flag} names another port")
