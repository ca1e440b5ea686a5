"""What a service reads from files, such as keys and certificates, and reads again when the files change."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from tandem_shared.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 1.0
"""How soon files that could not be loaded are tried again although they have not changed: the process may have had too
many files open, and a key that was withdrawn must not stay for that."""

Stamp = tuple[tuple[int, ...] | None, ...]


class Reloaded(Generic[T]):
    """A value that is made of some files.

    Replace such files by renaming new ones over them, as Kubernetes does for secrets. Files that change while they are
    read are read once more the next time.
    """

    def __init__(self, paths: Sequence[str], load: Callable[[], T]) -> None:
        """load reads the files and raises ConfigError if they are wrong, as this does then. Empty paths are ignored."""
        self._paths = [path for path in paths if path]
        self._load = load
        self._stamp = self._look()
        self._retry_at: float | None = None
        self.value = load()

    def refresh(self) -> bool:
        """Loads the value again if a file has changed since it was loaded, and says whether there is a new one. Files
        that are wrong now leave the value as it is, and the log says so once.
        """
        stamp = self._look()
        has_changed = stamp != self._stamp
        if not has_changed and (self._retry_at is None or time.monotonic() < self._retry_at):
            return False
        self._stamp = stamp
        try:
            self.value = self._load()
        except ConfigError as error:
            self._retry_at = time.monotonic() + RETRY_S
            if has_changed:
                logger.error("%s; what was read before stays in use", error)
            return False
        self._retry_at = None
        logger.info("read again: %s", ", ".join(self._paths))
        return True

    def _look(self) -> Stamp:
        return tuple(_stamp_of(path) for path in self._paths)


def _stamp_of(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
