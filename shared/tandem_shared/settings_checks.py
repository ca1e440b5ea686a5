"""What is wrong with settings beyond the limits of each: values that need others, and files that can't be."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from tandem_shared.errors import ConfigError
from tandem_shared.options import flag_of
from tandem_shared.rpc.grpc_options import is_loopback
from tandem_shared.tracing import check_traces

if TYPE_CHECKING:
    from tandem_shared.config import ServiceSettings
    from tandem_shared.gateway_settings import GatewaySettings

Settings: TypeAlias = Union["ServiceSettings", "GatewaySettings"]


def check_settings(settings: Settings) -> None:
    """Raises ConfigError for what is wrong with settings beyond the limits of each."""
    check_tls(settings)
    check_metrics_prefix(settings)
    check_exposure(settings)
    check_traces(getattr(settings, "otlp_traces_endpoint", ""))
    check_outputs(settings)


def check_tls(settings: Settings) -> None:
    """Raises ConfigError if one of several settings that need each other is missing."""
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("--tls-cert and --tls-key go together")
    if settings.tls_client_ca and not settings.tls_cert:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    for peer in ("worker", "scheduler"):
        # The scheduler is a client of its worker, and the gateway of its scheduler.
        cert, key, authority = (getattr(settings, f"{peer}_{name}", "") for name in ("tls_cert", "tls_key", "ca"))
        if bool(cert) != bool(key):
            raise ConfigError(f"--{peer}-tls-cert and --{peer}-tls-key go together")
        if cert and not authority:
            raise ConfigError(f"--{peer}-tls-cert needs --{peer}-ca")


def check_metrics_prefix(settings: Settings) -> None:
    """Raises ConfigError for a prefix with which no name is one of Prometheus's."""
    prefix = getattr(settings, "metrics_prefix", "")
    if not re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)?", prefix):
        raise ConfigError(f"--metrics-prefix must begin a metric's name, is {prefix!r}")


def check_exposure(settings: Settings) -> None:
    """Raises ConfigError where whoever reaches the port could use the service, and it was not told so."""
    if is_loopback(settings.host) or settings.tls_client_ca:
        return
    if hasattr(settings, "api_key_file") and hasattr(settings, "insecure"):
        # It is a service for clients.
        if not (settings.api_key_file or settings.tls_cert or settings.insecure):
            raise ConfigError(
                f"--host {settings.host} lets whoever reaches it use the service: give it --api-key-file, or "
                "--tls-cert with --tls-client-ca; or --insecure, if everybody who reaches it may"
            )
    elif not settings.session_secret_file:
        raise ConfigError(
            f"--host {settings.host} lets whoever reaches it open a session: give the worker and its scheduler the "
            "same --session-secret-file, or the worker --tls-client-ca"
        )


def check_outputs(settings: Settings) -> None:
    """Raises ConfigError for a file that can't be written once the service runs."""
    for name in ("port_file", "record"):
        path = getattr(settings, name, "")
        folder = Path(path).parent
        if not path:
            continue
        if not folder.is_dir():
            raise ConfigError(f"{flag_of(name)} {path}: there is no folder {folder}")
        if Path(path).is_dir():
            raise ConfigError(f"{flag_of(name)} {path}: is a folder")
        # A port file is replaced by another file.
        written = path if name == "record" and Path(path).exists() else folder
        if not os.access(written, os.W_OK):
            raise ConfigError(f"{flag_of(name)} {path}: {written} can't be written")
