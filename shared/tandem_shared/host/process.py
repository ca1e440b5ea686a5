"""What a process and the children that it starts share."""

import ctypes
import logging
import os
import resource
import signal
import sys
from typing import NoReturn

from tandem_shared.options import ENVIRONMENT_PREFIX

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

MAX_DESCRIPTORS = 1 << 20
"""What counts as no limit."""


def child_environment() -> dict[str, str]:
    """This process's, without its settings: children get theirs as flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}


def die_with_parent() -> None:
    """In a child, on Linux: the kernel kills it when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_parent(parent_pid: int) -> None:
    """die_with_parent, of a process that runs already: its parent, parent_pid when it began, may have died by now."""
    die_with_parent()
    if os.getppid() != parent_pid:
        sys.exit(1)


def adopt_orphans() -> None:
    """On Linux: processes below this one that lose their parent become its children, which it collects."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def leave(status: int) -> NoReturn:
    """Ends the process at once, whatever its threads and its event loop do, and where its output can't be written."""
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def raise_descriptor_limit() -> int:
    """Lets this process have as many file descriptors as it may; gives their number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(soft, MAX_DESCRIPTORS) if soft != resource.RLIM_INFINITY else MAX_DESCRIPTORS
