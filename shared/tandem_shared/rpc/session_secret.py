"""The secret that a scheduler shows its worker, from a file that both read."""

import hmac
import os
import secrets
import stat
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health

from tandem_shared.errors import ConfigError, Unauthenticated

SECRET_METADATA_KEY = "tandem-session-secret-bin"
MIN_BYTES, MAX_BYTES = 16, 4096


def read_secret(path: str) -> bytes:
    """The file's contents without white space at the ends, or b"" if the path is empty. If there is no file, it is made
    with a random secret, readable by this user only.

    Raises ConfigError if the file can't be read or made, or its length is wrong.
    """
    if not path:
        return b""
    try:
        _create(Path(path))
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"--session-secret-file {path}: is not a regular file")
        with open(path, "rb") as file:
            secret = file.read(MAX_BYTES + 1).strip()
    except OSError as error:
        raise ConfigError(f"--session-secret-file: {error}") from error
    if not MIN_BYTES <= len(secret) <= MAX_BYTES:
        raise ConfigError(f"--session-secret-file {path}: must hold {MIN_BYTES} to {MAX_BYTES} bytes")
    return secret


def _create(path: Path) -> None:
    """Makes the file if there is none. It appears with all of its contents, as two services may start at once."""
    if path.exists():
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        os.link(partial, path)
    except FileExistsError:
        # The other service was first.
        pass
    finally:
        partial.unlink()


class SecretInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls that do not show the secret, but for those of the health service."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        if not handler_call_details.method.startswith(f"/{health.SERVICE_NAME}/"):
            metadata: Any = dict(handler_call_details.invocation_metadata or ())
            shown = metadata.get(SECRET_METADATA_KEY, b"")
            if not hmac.compare_digest(shown if isinstance(shown, bytes) else shown.encode(), self._secret):
                raise Unauthenticated("the session secret is missing or wrong; see --session-secret-file")
        return await continuation(handler_call_details)
