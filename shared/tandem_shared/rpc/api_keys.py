"""API keys: the file that names them, and how a bearer token finds its key.

Each line of the file is a key: its name, its scopes, the key itself, and what else it may do:

    # name    scopes              key (16 printable characters or more)    options
    alice     inference           3f0c9a5e77b14d1c8e21                      priority=0..10
    ops       inference,control   b7c41d2f90e84a6ab3d5                      priority=-10..100
    grafana   control             5a2e8c11d7f04b9f9c60

The name stands for the key in logs; the key itself is never logged. Tokens are compared with every key, by digests of
one length, so that the time of a comparison tells nothing. The file is read again when it changes.
"""

import enum
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tandem_shared.errors import ConfigError, InvalidApiKey, PermissionDenied
from tandem_shared.host.reloaded import Reloaded

MIN_KEY_CHARACTERS, MAX_KEY_CHARACTERS = 16, 256
MAX_KEYS = 1024
MAX_FILE_BYTES = 2**20

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PRIORITY = re.compile(r"priority=(-?\d{1,10})\.\.(-?\d{1,10})")
_BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)


class Scope(enum.Enum):
    """What a key is for."""

    INFERENCE = "inference"
    CONTROL = "control"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, without the secret itself."""

    name: str
    scopes: frozenset[Scope]
    digest: bytes = field(repr=False)
    """The SHA-256 digest of the key."""
    cache_salt: bytes = field(repr=False)
    """Of 32 bytes. Only requests of equal salts share cached prefixes."""
    min_priority: int = 0
    max_priority: int = 0
    """The priorities that its requests may have. A lower number is served earlier."""

    def check_scope(self, scope: Scope) -> None:
        """Raises PermissionDenied if the key is not for this."""
        if scope not in self.scopes:
            raise PermissionDenied(f"the API key {self.name!r} is not for {scope.value}")

    def check_priority(self, priority: int) -> None:
        """Raises PermissionDenied if the key's requests may not have this priority."""
        if not self.min_priority <= priority <= self.max_priority:
            raise PermissionDenied(
                f"priority: the API key {self.name!r} allows {self.min_priority} to {self.max_priority}, not {priority}"
            )


class KeyFile:
    """The keys of a file, as it is now."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError, which names the line, if the file can't be read or is wrong, or has no key."""
        self._keys = Reloaded([path], lambda: read_keys(path))
        if not self._keys.value:
            raise ConfigError(f"--api-key-file {path}: has no keys")

    def find(self, authorizations: Sequence[str | bytes]) -> ApiKey:
        """The key of a call with these values of the metadata or header `authorization`. Raises InvalidApiKey."""
        self._keys.refresh()
        if not authorizations:
            raise InvalidApiKey("an API key is needed: send the metadata 'authorization: Bearer KEY'")
        value = authorizations[0]
        bearer = _BEARER.fullmatch(value) if isinstance(value, str) and len(authorizations) == 1 else None
        digest = _digest(bearer[1] if bearer else "")
        found = None
        for key in self._keys.value:
            if hmac.compare_digest(digest, key.digest):
                found = key
        if found is None:
            raise InvalidApiKey("the API key is not known")
        return found


def read_keys(path: str) -> tuple[ApiKey, ...]:
    """The keys of a file. Raises ConfigError, which names the line and quotes nothing of it."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        lines = data.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file: {path}: {_reason(error)}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"--api-key-file {path}: has more than {MAX_FILE_BYTES} bytes")
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key = _read_key(words, f"--api-key-file {path}, line {number}")
        if key.name in keys or any(key.digest == other.digest for other in keys.values()):
            raise ConfigError(f"--api-key-file {path}, line {number}: an earlier line has the same name or key")
        keys[key.name] = key
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"--api-key-file {path}: has more than {MAX_KEYS} keys")
    return tuple(keys.values())


def _read_key(words: Sequence[str], where: str) -> ApiKey:
    if len(words) < 3:
        raise ConfigError(f"{where}: must be NAME SCOPES KEY")
    name, scopes, secret, *options = words
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a name has up to 64 letters, digits and . _ -")
    known = {scope.value: scope for scope in Scope}
    if not known.keys() >= set(scopes.split(",")):
        raise ConfigError(f"{where}: scopes must be {', '.join(known)}, or several joined by commas")
    is_key = secret.isascii() and secret.isprintable() and MIN_KEY_CHARACTERS <= len(secret) <= MAX_KEY_CHARACTERS
    if not is_key:
        raise ConfigError(f"{where}: a key has {MIN_KEY_CHARACTERS} to {MAX_KEY_CHARACTERS} printable ASCII characters")
    lowest, highest = _read_priorities(options, where)
    return ApiKey(
        name,
        frozenset(known[each] for each in scopes.split(",")),
        _digest(secret),
        hashlib.blake2b(secret.encode(), key=name.encode(), digest_size=32, person=b"tandem-salt").digest(),
        lowest,
        highest,
    )


def _read_priorities(options: Sequence[str], where: str) -> tuple[int, int]:
    if not options:
        return 0, 0
    found = _PRIORITY.fullmatch(options[0]) if len(options) == 1 else None
    if found is None or not -(2**31) <= int(found[1]) <= int(found[2]) < 2**31:
        raise ConfigError(f"{where}: after the key there may only be priority=LOWEST..HIGHEST, numbers of 32 bits")
    return int(found[1]), int(found[2])


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _reason(error: Exception) -> str:
    """Why the file can't be read, without its contents, which a UnicodeDecodeError quotes."""
    return error.strerror or "can't be read" if isinstance(error, OSError) else "is not a text in UTF-8"
