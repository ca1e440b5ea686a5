"""Temporary folders that do not outlive their process for long, even if it was killed: a process that makes one removes
those whose processes have ended.

A folder holds a file that its process keeps locked (flock). The kernel drops the lock when the process ends, also after
kill -9, so a lock that can be taken shows that the process is gone. Process ids would not show it: they are used again,
and mean nothing across containers that share a folder. Only folders that have such a file and belong to this user are
removed.
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
    """A new folder that only this user can enter. close() removes it. If this process ends without that, the next
    process that makes one does.
    """

    def __init__(self, prefix: str = PREFIX) -> None:
        """prefix: how the folder's name begins. It must begin with PREFIX."""
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
        """Removes the folder. Does nothing if that was done before."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_abandoned() -> None:
    """Removes the folders that ended processes of this user have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = _take_lock(folder)
        except OSError:
            # It is not a PrivateFolder, or another process has just removed it.
            continue
        if lock is not None:
            logger.info("removing %s, whose process is gone", folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _take_lock(folder: Path, flags: int = 0) -> int | None:
    """A file descriptor that holds the folder's lock, or None if another process holds it or has removed the folder
    meanwhile. Raises OSError if the folder has no lock file and the flags do not create one.
    """
    path = folder / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.lstat()):
            return descriptor
    os.close(descriptor)
    return None
