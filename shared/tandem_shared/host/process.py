"""How processes start, say on which port they listen, end with their parents, and leave. Functions that work on Linux
alone say so.
"""

import ctypes
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import NoReturn

from tandem_shared.options import ENVIRONMENT_PREFIX

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

MAX_DESCRIPTORS = 1 << 20
"""The number of file descriptors that stands for no limit."""


def write_port_file(path: str, port: int) -> None:
    """Writes the port to a file, if the path is not empty. The file appears with all of its contents, as other
    processes may wait for it.
    """
    if path:
        partial = Path(f"{path}.{os.getpid()}")
        partial.write_text(f"{port}\n")
        partial.replace(path)


def child_environment() -> dict[str, str]:
    """This process's environment without Tandem's settings, which child processes get as flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}


def die_with_parent() -> None:
    """Called in a child process, on Linux: the kernel kills it when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_parent(parent_pid: int) -> None:
    """die_with_parent() for a process that already runs, whose parent, parent_pid, may have died before the call."""
    die_with_parent()
    if os.getppid() != parent_pid:
        sys.exit(1)


def adopt_orphans() -> None:
    """On Linux: descendants of this process that lose their parent become its children, for it to collect."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def leave(status: int) -> NoReturn:
    """Ends the process at once, whatever its threads and event loop do, and even if its output can't be written."""
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def raise_descriptor_limit() -> int:
    """Raises this process's limit of open files to the most that it may have, and returns that number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(soft, MAX_DESCRIPTORS) if soft != resource.RLIM_INFINITY else MAX_DESCRIPTORS
