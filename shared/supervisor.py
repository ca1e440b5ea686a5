"""Keeps a service process running: starts it, and starts it again whenever it fails.

The supervisor is a process of its own, small enough to stand beside any number of services: it imports neither torch
nor grpc, has one thread and sleeps until something happens. It knows nothing of what the service does. The service
says once that it serves, and on which port, through a pipe whose descriptor is in READY_VARIABLE. From then on the
port is kept: whoever knows the address finds the next process there, also where the first one took a free port.

What the end of the process means:

- status 0, or any status once the supervisor has been told to stop: the supervisor ends.
- status 2 (wrong settings, a model that can't be served) before it has ever served: the supervisor ends with 2.
- anything else, a signal such as that of kill -9 included: the process is started again after a pause, which doubles
  from MIN_BACKOFF_S up to MAX_BACKOFF_S and is short again for one that has lived long. A process that has never
  served is started MAX_FIRST_STARTS times at most: what is wrong then is not going to pass.

At SIGTERM or SIGINT the process gets SIGTERM; at a second one it is killed. It runs in a session of its own, so that a
terminal's Ctrl-C reaches it once, through the supervisor. On Linux the kernel kills it when the supervisor dies, and
orphans of it (the ranks of a group whose rank 0 was killed) become the supervisor's own children. It collects whatever
child ends, as the first process of a container must.
"""

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from shared.process import adopt_orphans, child_environment, die_with_parent

READY_VARIABLE = "SUPERVISOR_READY_FD"
MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 5.0
LONG_LIFE_S = 10.0
"""A process that has lived for so long is started again after the shortest pause."""
MAX_FIRST_STARTS = 3
STOP_LIMIT_S = 35.0
"""A process that has been told to stop is killed after so long; a worker of several ranks gives itself 32 s."""
WRONG_SETTINGS, CANNOT_START = 2, 71
"""Exit statuses: of a service, as argparse has it; of one that the system did not start, as sysexits.h has it."""

logger = logging.getLogger(__name__)


def tell_supervisor(port: int) -> None:
    """Says, in the supervised process, that it serves on this port. Does nothing where there is no supervisor."""
    descriptor = os.environ.pop(READY_VARIABLE, None)
    if descriptor is not None:
        with os.fdopen(int(descriptor), "w") as pipe:
            pipe.write(f"{port}\n")


class Supervisor:
    """Runs one command. A second process in waiting would be a second child of the same loop."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        min_backoff_s: float = MIN_BACKOFF_S,
        max_backoff_s: float = MAX_BACKOFF_S,
        stop_limit_s: float = STOP_LIMIT_S,
    ) -> None:
        """name is what logs call the process; command takes --port."""
        self._name = name
        self._command = list(command)
        self._min_backoff_s, self._max_backoff_s = min_backoff_s, max_backoff_s
        self._stop_limit_s = stop_limit_s
        self._port: int | None = None
        self._is_stopping = False
        self._child_pid: int | None = None
        self._child_status: int | None = None
        self._kill_at: float | None = None
        # Signals arrive as bytes, so that one wait hears of signals and of the child alike.
        self._signals, self._signal_writer = socket.socketpair()
        for end in (self._signals, self._signal_writer):
            end.setblocking(False)

    def run(self) -> int:
        """Until the end; gives the exit status for the supervisor's own process."""
        signal.set_wakeup_fd(self._signal_writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        if sys.platform == "linux":
            adopt_orphans()
        backoff_s, num_failures = self._min_backoff_s, 0
        while True:
            started = time.monotonic()
            status = self._run_child()
            num_failures += 1
            if self._is_stopping or status == 0:
                return self._final_status(status)
            has_given_up = status == WRONG_SETTINGS or num_failures == MAX_FIRST_STARTS
            if self._port is None and has_given_up:
                logger.error("the %s %s before it served", self._name, _describe(status))
                return self._final_status(status)
            if time.monotonic() - started > LONG_LIFE_S:
                backoff_s = self._min_backoff_s
            logger.warning("the %s %s; starting it again in %.2f s", self._name, _describe(status), backoff_s)
            self._pause(backoff_s)
            if self._is_stopping:
                return 0
            backoff_s = min(2 * backoff_s, self._max_backoff_s)

    def _run_child(self) -> int:
        """One life of the process, from its start to its exit status (negative: the signal that ended it)."""
        ready, ready_writer = os.pipe()
        try:
            child = self._start_child(ready_writer)
        except (OSError, subprocess.SubprocessError) as error:
            # As where the system has no memory or no process to spare.
            logger.error("can't start the %s: %s", self._name, error)
            os.close(ready)
            return CANNOT_START
        finally:
            os.close(ready_writer)
        logger.info("the %s is process %d", self._name, child.pid)
        self._child_pid, self._child_status = child.pid, None
        has_told = False
        while self._child_status is None:
            if self._wait(self._kill_at, [] if has_told else [ready]):
                has_told = True
                # Empty where the process ends before it serves.
                self._port = int(os.read(ready, 64) or 0) or self._port
        os.close(ready)
        self._child_pid, child.returncode = None, self._child_status
        return self._child_status

    def _start_child(self, ready_writer: int) -> "subprocess.Popen[bytes]":
        arguments = [] if self._port is None else ["--port", str(self._port)]
        return subprocess.Popen(
            [*self._command, *arguments],
            stdin=subprocess.DEVNULL,
            env={**child_environment(), READY_VARIABLE: str(ready_writer)},
            pass_fds=[ready_writer],
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )

    def _pause(self, duration_s: float) -> None:
        deadline = time.monotonic() + duration_s
        while not self._is_stopping and time.monotonic() < deadline:
            self._wait(deadline)

    def _wait(self, deadline: float | None, watched: Sequence[int] = ()) -> bool:
        """Until something happens or the deadline passes. Whether a watched descriptor has something to read."""
        timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        own = self._signals.fileno()
        readable, _, _ = select.select([own, *watched], [], [], timeout_s)
        if own in readable:
            for number in self._signals.recv(4096):
                if number != signal.SIGCHLD:
                    self._stop()
        self._reap()
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            logger.error("the %s has not ended in %g s; killing it", self._name, self._stop_limit_s)
            self._kill_at = None
            self._signal_child(signal.SIGKILL)
        return any(descriptor in readable for descriptor in watched)

    def _stop(self) -> None:
        self._signal_child(signal.SIGKILL if self._is_stopping else signal.SIGTERM)
        self._kill_at = None if self._is_stopping else time.monotonic() + self._stop_limit_s
        self._is_stopping = True

    def _signal_child(self, number: int) -> None:
        # Nobody else collects it, so its id is its own until _reap() has run.
        if self._child_pid is not None and self._child_status is None:
            os.kill(self._child_pid, number)

    def _reap(self) -> None:
        """Collects all children that have ended: the process, and orphans that became ours."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._child_pid:
                self._child_status = os.waitstatus_to_exitcode(status)

    def _final_status(self, status: int) -> int:
        """As a shell gives it, but 0 where the process ended by the signal that it was told to stop with."""
        if self._is_stopping and status == -signal.SIGTERM:
            return 0
        return status if status >= 0 else 128 - status


def _describe(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}"
