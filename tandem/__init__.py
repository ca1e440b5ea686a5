"""What a user imports: the clients, which call a running server, LLM, which runs a server of its own, and the errors
that they raise.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.async_client import AsyncTandemClient
    from tandem.chat import Chat
    from tandem.client import TandemClient
    from tandem.llm import LLM
    from tandem.outputs import CompletionOutput, Logprob, PromptsFailed, RequestOutput
    from tandem.processes import ServiceFailed
    from tandem.sampling_params import SamplingParams
    from tandem.structured_output import StructuredOutput
    from tandem_shared import VERSION as __version__
    from tandem_shared.errors import (
        ConfigError,
        DeadlinePassed,
        Draining,
        FieldViolation,
        InvalidApiKey,
        InvalidRequest,
        ModelError,
        OutputTooLarge,
        PermissionDenied,
        ProtocolError,
        QueueFull,
        RequestIdInUse,
        RequestNotFound,
        RequestTooSlow,
        RetryLater,
        SequenceFailed,
        TandemError,
        TextFailed,
        Undrained,
        WorkerUnavailable,
    )

__all__ = [
    "LLM",
    "AsyncTandemClient",
    "Chat",
    "CompletionOutput",
    "ConfigError",
    "DeadlinePassed",
    "Draining",
    "FieldViolation",
    "InvalidApiKey",
    "InvalidRequest",
    "Logprob",
    "ModelError",
    "OutputTooLarge",
    "PermissionDenied",
    "PromptsFailed",
    "ProtocolError",
    "QueueFull",
    "RequestIdInUse",
    "RequestNotFound",
    "RequestOutput",
    "RequestTooSlow",
    "RetryLater",
    "SamplingParams",
    "SequenceFailed",
    "ServiceFailed",
    "StructuredOutput",
    "TandemClient",
    "TandemError",
    "TextFailed",
    "Undrained",
    "WorkerUnavailable",
    "__version__",
]

_MODULES = {
    "AsyncTandemClient": "tandem.async_client",
    "Chat": "tandem.chat",
    "CompletionOutput": "tandem.outputs",
    "LLM": "tandem.llm",
    "Logprob": "tandem.outputs",
    "PromptsFailed": "tandem.outputs",
    "RequestOutput": "tandem.outputs",
    "SamplingParams": "tandem.sampling_params",
    "ServiceFailed": "tandem.processes",
    "StructuredOutput": "tandem.structured_output",
    "TandemClient": "tandem.client",
}
"""Where a name is. All others are in tandem_shared.errors."""


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: the services import only the stubs inside this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name == "__version__":
        return importlib.import_module("tandem_shared").VERSION
    return getattr(importlib.import_module(_MODULES.get(name, "tandem_shared.errors")), name)
