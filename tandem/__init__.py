"""What a user imports: TandemClient, which calls a running server, and LLM, which runs a server of its own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.client import TandemClient
    from tandem.llm import LLM
    from tandem.sampling_params import SamplingParams
    from tandem.structured_output import StructuredOutput

__all__ = ["LLM", "SamplingParams", "StructuredOutput", "TandemClient"]

_MODULES = {
    "LLM": "tandem.llm",
    "SamplingParams": "tandem.sampling_params",
    "StructuredOutput": "tandem.structured_output",
    "TandemClient": "tandem.client",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: the services import only the stubs inside this package."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
