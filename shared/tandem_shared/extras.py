"""The extras of the package, and a check that an extra is installed.

`pip install tandem-llm` installs what the client needs. What a service needs beside that comes with the extra of its
name.
"""

import importlib.util

from tandem_shared.errors import ConfigError

_SCHEDULER_MODULES = (
    "grpc_channelz",
    "grpc_health",
    "grpc_reflection",
    "huggingface_hub",
    "jinja2",
    "llguidance",
    "numpy",
    "prometheus_client",
    "tokenizers",
    "xxhash",
    "yaml",
)
MODULES_OF_EXTRA = {
    "cli": ("httptools", "rich"),
    "gateway": ("fastapi", "grpc_health", "httptools", "prometheus_client", "uvicorn", "uvloop", "yaml"),
    "otel": ("opentelemetry.exporter.otlp.proto.grpc", "opentelemetry.sdk"),
    "scheduler": _SCHEDULER_MODULES,
    "smg": (*_SCHEDULER_MODULES, "smg_grpc_proto"),
    "worker": (*_SCHEDULER_MODULES, "safetensors", "torch"),
}
"""The modules that each extra is for: those of the packages that pyproject.toml lists for it. The extra worker, which
is all of Tandem, brings those of cli and gateway too.
"""


def require_extra(extra: str) -> None:
    """Raises ConfigError, which says what to install, unless all modules of the extra can be found.

    It imports none of them, only packages that they are in, so it is quick even for an extra with torch.
    """
    missing = [name for name in MODULES_OF_EXTRA[extra] if not _can_be_found(name)]
    if missing:
        raise ConfigError(f"install tandem-llm[{extra}]: no module named {', '.join(missing)}")


def _can_be_found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # The package that it would be in is missing.
        return False
