"""Temporary folders that are gone once their owner is, however it ended: who makes one removes what others left.

A folder holds a file that its owner keeps locked (flock) for as long as it lives. The kernel drops the lock with the
process, after kill -9 too, so a lock that can be had says that the owner is gone. Process ids would not do: they are
used again, and mean nothing across containers that share a folder. Only folders with such a file, of this user, are
ever removed.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "tandem-"
LOCK_NAME = ".tandem-in-use"

logger = logging.getLogger(__name__)


class PrivateFolder:
    """A new folder that only this user can enter. close() removes it; so does whoever makes the next one after this
    process has ended without.
    """

    def __init__(self, prefix: str = PREFIX) -> None:
        """prefix begins with PREFIX."""
        assert prefix.startswith(PREFIX), prefix
        remove_abandoned()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix))
            lock = _take_lock(self.path, os.O_CREAT)
            if lock is not None:
                self._lock = lock
                return

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """A second time it does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_abandoned() -> None:
    """Removes folders of processes of this user that have ended without doing so."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = _take_lock(folder)
        except OSError:
            # Not a folder of this kind, or its owner or another cleaner has just removed it.
            continue
        if lock is not None:
            logger.info("removing %s, whose owner is gone", folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _take_lock(folder: Path, flags: int = 0) -> int | None:
    """A descriptor that holds the folder's lock; None where another process holds it, or has removed the folder before
    the lock was taken. OSError where the folder has no lock file, unless flags make one.
    """
    path = folder / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.lstat()):
            return descriptor
    os.close(descriptor)
    return None
