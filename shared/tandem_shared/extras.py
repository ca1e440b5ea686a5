"""The package's extras, and a check that what they install is there.

`pip install tandem-llm` brings the client alone. What a service imports besides comes with the extra of its name.
"""

import importlib.util

from tandem_shared.errors import ConfigError

_SCHEDULER_MODULES = (
    "grpc_channelz",
    "grpc_health",
    "grpc_reflection",
    "huggingface_hub",
    "numpy",
    "tokenizers",
    "xxhash",
)
MODULES_OF_EXTRA = {"scheduler": _SCHEDULER_MODULES, "worker": (*_SCHEDULER_MODULES, "safetensors", "torch")}
"""Extra -> the modules of the packages that pyproject.toml lists for it."""


def require_extra(extra: str) -> None:
    """Raises ConfigError, which says what to install, unless all modules of the extra can be found.

    Nothing is imported, so this takes no time even where the extra brings torch.
    """
    missing = [name for name in MODULES_OF_EXTRA[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"install tandem-llm[{extra}]: no module named {', '.join(missing)}")
