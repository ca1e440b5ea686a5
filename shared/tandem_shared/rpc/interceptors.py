"""Interceptors that a setting names, of packages that Tandem does not know."""

import importlib

import grpc

from tandem_shared.errors import ConfigError


def load_interceptors(names: str) -> list[grpc.aio.ServerInterceptor]:
    """Makes the interceptors of MODULE:CLASS,MODULE:CLASS... Raises ConfigError if one can't be made."""
    return [_load(name.strip()) for name in names.split(",") if name.strip()]


def _load(name: str) -> grpc.aio.ServerInterceptor:
    module, _, attribute = name.partition(":")
    try:
        interceptor = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        # Any code may run here, and whatever it raises, the setting that named it is to be looked at.
        raise ConfigError(f"--interceptor {name}: {type(error).__name__}: {error}") from error
    if not isinstance(interceptor, grpc.aio.ServerInterceptor):
        raise ConfigError(f"--interceptor {name}: is not a grpc.aio.ServerInterceptor")
    return interceptor
