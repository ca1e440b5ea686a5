"""Keeps a service process running: starts it, and starts it again whenever it fails.

The supervisor is a process of its own, small enough to stand beside any number of services: it imports neither torch
nor grpc, has one thread and does nothing but wait. It knows nothing of what the service does. The service says once
that it serves, and on which port, through a pipe whose descriptor is in WORDS_VARIABLE; from then on it says every
HEARTBEAT_S that it is alive. The port is kept: whoever knows the address finds the next process there, also where the
first one took a free port.

What the end of the process means:

- status 0, or any status once the supervisor has been told to stop: the supervisor ends.
- status 2 (wrong settings, a model that can't be served) before it has ever served: the supervisor ends with 2.
- anything else, a signal such as that of kill -9 included: the process is started again after a pause, which doubles
  from MIN_BACKOFF_S up to MAX_BACKOFF_S and is short again for one that has lived long. A process that has never
  served is started MAX_FIRST_STARTS times at most: what is wrong then is not going to pass.

A process that serves and falls silent is killed, and so fails: it is stopped, or a thread of it keeps the interpreter's
lock for ever, and then it can't watch itself. Silence is counted in turns of the supervisor's own loop, so that a
supervisor that was itself stopped blames nobody.

At SIGTERM or SIGINT the process gets SIGTERM; at a second one it is killed. It runs in a session of its own, so that a
terminal's Ctrl-C reaches it once, through the supervisor. On Linux the kernel kills it when the supervisor dies, and
orphans of it (the ranks of a group whose rank 0 was killed) become the supervisor's own children. It collects whatever
child ends, as the first process of a container must.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from tandem_shared.host.process import adopt_orphans, child_environment, die_with_parent

WORDS_VARIABLE = "SUPERVISOR_WORDS_FD"
MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 5.0
LONG_LIFE_S = 10.0
"""A process that has lived for so long is started again after the shortest pause."""
MAX_FIRST_STARTS = 3
STOP_LIMIT_S = 35.0
"""A process that has been told to stop is killed after so long; a worker of several ranks gives itself 32 s."""
HEARTBEAT_S = 1.0
SILENCE_LIMIT_S = 20.0
"""A process that serves and says nothing for so long is killed. A thread of its own speaks, which only what holds the
interpreter's lock delays; and the next process is there before requests are given up (--worker-wait-s)."""
WRONG_SETTINGS, CANNOT_START = 2, 71
"""Exit statuses: of a service, as argparse has it; of one that the system did not start, as sysexits.h has it."""

logger = logging.getLogger(__name__)


def tell_supervisor(port: int) -> None:
    """Says, in the supervised process, that it serves on this port, and from now on that it is alive. Does nothing
    where there is no supervisor.
    """
    variable = os.environ.pop(WORDS_VARIABLE, None)
    if variable is not None:
        descriptor = int(variable)
        os.write(descriptor, f"{port}\n".encode())
        threading.Thread(target=_beat, args=[descriptor], name="heartbeat", daemon=True).start()


def _beat(descriptor: int) -> None:
    # Without a supervisor there is nobody to tell; on Linux this process ends with it.
    with contextlib.suppress(BrokenPipeError):
        while True:
            time.sleep(HEARTBEAT_S)
            os.write(descriptor, b".")


class _Child:
    """One life of the process."""

    def __init__(self, command: Sequence[str]) -> None:
        """Starts it. OSError and SubprocessError where the system does not."""
        self.port: int | None = None
        """Known once it serves"""
        self.status: int | None = None
        """Known once it has ended: an exit status, or minus the signal that ended it"""
        self.silent_s = 0.0
        self._words, writer = os.pipe()
        os.set_blocking(self._words, False)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env={**child_environment(), WORDS_VARIABLE: str(writer)},
                pass_fds=[writer],
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
        except BaseException:
            os.close(self._words)
            raise
        finally:
            os.close(writer)
        self.pid = self._process.pid
        self.descriptors = [self._words]
        """To wait for; none once it will say no more"""

    def hear(self) -> None:
        words = os.read(self._words, 4096)
        if not words:
            self.descriptors = []
        elif self.port is None:
            self.port = int(words.split()[0])
        self.silent_s = 0.0

    @property
    def is_watched(self) -> bool:
        """Whether silence means anything."""
        return self.port is not None and bool(self.descriptors)

    def send(self, number: int) -> None:
        # Nobody collects it but end()'s caller, so until then its id is its own.
        if self.status is None:
            os.kill(self.pid, number)

    def end(self, status: int) -> None:
        """It has ended, and was collected."""
        self.status = self._process.returncode = status
        # Its last words. What it has forked may hold its end of the pipe, so there may be neither words nor an end.
        with contextlib.suppress(BlockingIOError):
            self.hear()
        self.descriptors = []
        os.close(self._words)


class Supervisor:
    """Runs one command. A process in waiting would be a second child of the same loop."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        min_backoff_s: float = MIN_BACKOFF_S,
        max_backoff_s: float = MAX_BACKOFF_S,
        stop_limit_s: float = STOP_LIMIT_S,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        """name is what logs call the process; command takes --port."""
        self._name = name
        self._command = list(command)
        self._min_backoff_s, self._max_backoff_s = min_backoff_s, max_backoff_s
        self._stop_limit_s, self._silence_limit_s = stop_limit_s, silence_limit_s
        self._port: int | None = None
        self._child: _Child | None = None
        self._is_stopping = False
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
            deadline = time.monotonic() + backoff_s
            while not self._is_stopping and time.monotonic() < deadline:
                self._wait(deadline)
            if self._is_stopping:
                return 0
            backoff_s = min(2 * backoff_s, self._max_backoff_s)

    def _run_child(self) -> int:
        """One life of the process, from its start to its status."""
        port = [] if self._port is None else ["--port", str(self._port)]
        try:
            child = self._child = _Child([*self._command, *port])
        except (OSError, subprocess.SubprocessError) as error:
            # As where the system has no memory or no process to spare.
            logger.error("can't start the %s: %s", self._name, error)
            return CANNOT_START
        logger.info("the %s is process %d", self._name, child.pid)
        turn_at = time.monotonic() + HEARTBEAT_S
        while child.status is None:
            self._wait(turn_at)
            self._port = child.port or self._port
            if time.monotonic() >= turn_at:
                turn_at = time.monotonic() + HEARTBEAT_S
                self._kill_if_overdue(child)
        self._child = None
        return child.status

    def _wait(self, deadline: float) -> None:
        """Until something happens or the deadline passes; sees to what has happened."""
        own, words = self._signals.fileno(), self._child.descriptors if self._child else []
        readable, _, _ = select.select([own, *words], [], [], max(0.0, deadline - time.monotonic()))
        if own in readable:
            for number in self._signals.recv(4096):
                if number != signal.SIGCHLD:
                    self._stop()
        if self._child and any(descriptor in readable for descriptor in words):
            self._child.hear()
        self._reap()

    def _stop(self) -> None:
        if self._child:
            self._child.send(signal.SIGKILL if self._is_stopping else signal.SIGTERM)
        if not self._is_stopping:
            self._kill_at = time.monotonic() + self._stop_limit_s
        self._is_stopping = True

    def _kill_if_overdue(self, child: _Child) -> None:
        """Called once a turn."""
        child.silent_s += HEARTBEAT_S if child.is_watched else 0.0
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            logger.error("the %s has not ended in %g s; killing it", self._name, self._stop_limit_s)
        elif child.silent_s > self._silence_limit_s:
            logger.error("the %s has been silent for %g s; killing it", self._name, child.silent_s)
        else:
            return
        child.send(signal.SIGKILL)

    def _reap(self) -> None:
        """Collects all children that have ended: the process, and orphans that became ours."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._child and pid == self._child.pid:
                self._child.end(os.waitstatus_to_exitcode(status))

    def _final_status(self, status: int) -> int:
        """As a shell gives it, but 0 where the process ended by the signal that it was told to stop with."""
        if self._is_stopping and status == -signal.SIGTERM:
            return 0
        return status if status >= 0 else 128 - status


def _describe(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}"
