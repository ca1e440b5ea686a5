"""Keeps a service process running: starts it, and starts it again whenever it fails.

The supervisor is a process of its own. It imports neither torch nor grpc, has one thread and does nothing but wait, so
that it costs little beside a service, of which it knows nothing. The service process writes to a pipe, whose file
descriptor is in the variable PIPE_VARIABLE: once its port, when it serves, and from then on a heartbeat every
HEARTBEAT_S. Later processes get the same port, also if the first one took a free port, so the service's address stays.

What happens when the process ends:

- With status 0, or with any status once the supervisor was told to stop, the supervisor ends too.
- With status 2 (wrong settings, a model that can't be served) before it has ever served, the supervisor ends with 2.
- Otherwise, also after a signal such as that of kill -9, the process is started again after a pause. The pause doubles
  from MIN_BACKOFF_S up to MAX_BACKOFF_S, and is the shortest one again for a process that has lived LONG_LIFE_S. A
  process that has never served is started MAX_FIRST_STARTS times at most, as what is wrong then will not pass.

A process that serves and falls silent is killed, and so fails. It may have been stopped by a signal, or one of its
threads holds the interpreter's lock for ever, so that it can't watch itself. The silence is counted in rounds of the
supervisor's loop and not by a clock, so that a supervisor that was stopped itself does not kill a healthy process.

At the first SIGTERM or SIGINT the process gets SIGTERM; at a second one it is killed. It runs in a session of its own,
so that a terminal's Ctrl-C reaches it only through the supervisor. On Linux the kernel kills it when the supervisor
dies, and its orphans (ranks whose rank 0 was killed) become the supervisor's children. The supervisor collects every
child that ends, as the first process of a container must.
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

PIPE_VARIABLE = "SUPERVISOR_PIPE_FD"
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 5.0
MAX_FIRST_STARTS = 3
LONG_LIFE_S = 10.0
"""A process that has lived this long is started again after the shortest pause."""
STOP_LIMIT_S = 35.0
"""A process that was told to stop is killed after this time. A worker of several ranks gives itself 32 s."""
HEARTBEAT_S = 1.0
SILENCE_LIMIT_S = 20.0
"""A process that serves and sends no heartbeat for this time is killed. The heartbeat has a thread of its own, which
only the interpreter's lock can delay. The next process serves before requests give up waiting (--worker-wait-s).
"""
WRONG_SETTINGS = 2
"""The exit status of a service whose settings are wrong: argparse's."""
CANNOT_START = 71
"""The supervisor's exit status if the system could not start the process: EX_OSERR of sysexits.h."""

logger = logging.getLogger(__name__)


def tell_supervisor(port: int) -> None:
    """Called in the supervised process: tells the supervisor that it serves on this port, and starts the heartbeat.
    Does nothing if there is no supervisor.
    """
    variable = os.environ.pop(PIPE_VARIABLE, None)
    if variable is not None:
        descriptor = int(variable)
        os.write(descriptor, f"{port}\n".encode())
        threading.Thread(target=_beat, args=[descriptor], name="heartbeat", daemon=True).start()


def _beat(descriptor: int) -> None:
    # The pipe breaks when the supervisor ends; on Linux this process then ends too.
    with contextlib.suppress(BrokenPipeError):
        while True:
            time.sleep(HEARTBEAT_S)
            os.write(descriptor, b".")


class _Child:
    """One process of the service, from its start to its end."""

    def __init__(self, command: Sequence[str]) -> None:
        """Starts the process. Raises OSError or SubprocessError if the system can't start it."""
        self.port: int | None = None
        """The port it serves on, None until it serves."""
        self.status: int | None = None
        """None until it has ended: then its exit status, or minus the number of the signal that ended it."""
        self.silent_s = 0.0
        self._pipe, writer = os.pipe()
        os.set_blocking(self._pipe, False)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env={**child_environment(), PIPE_VARIABLE: str(writer)},
                pass_fds=[writer],
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(writer)
        self.pid = self._process.pid
        self.descriptors = [self._pipe]
        """The pipe to wait for; empty once it is closed at the other end."""

    def read_pipe(self) -> None:
        data = os.read(self._pipe, 4096)
        if not data:
            self.descriptors = []
        elif self.port is None:
            self.port = int(data.split()[0])
        self.silent_s = 0.0

    @property
    def is_watched(self) -> bool:
        """Whether heartbeats are due."""
        return self.port is not None and bool(self.descriptors)

    def send(self, number: int) -> None:
        # Its id belongs to no other process until it is collected, which only the caller of end() does.
        if self.status is None:
            os.kill(self.pid, number)

    def end(self, status: int) -> None:
        """Called when it has ended and was collected, with its status."""
        self.status = self._process.returncode = status
        # It may have written its port just before it ended. There may be nothing to read and no end of the pipe either,
        # as processes that it forked may hold the other end open.
        with contextlib.suppress(BlockingIOError):
            self.read_pipe()
        self.descriptors = []
        os.close(self._pipe)


class Supervisor:
    """Runs one command, again and again."""

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
        """name: what the log calls the process. command: what runs it; later starts append --port."""
        self._name = name
        self._command = list(command)
        self._min_backoff_s, self._max_backoff_s = min_backoff_s, max_backoff_s
        self._stop_limit_s, self._silence_limit_s = stop_limit_s, silence_limit_s
        self._port: int | None = None
        self._child: _Child | None = None
        self._is_stopping = False
        self._kill_at: float | None = None
        # Signals arrive as bytes on a socket, so that one select() waits for signals and for the child's pipe.
        self._signals, self._signal_writer = socket.socketpair()
        for end in (self._signals, self._signal_writer):
            end.setblocking(False)

    def run(self) -> int:
        """Runs until the process ends for good. Returns the exit status for the supervisor's own process."""
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
        """Runs the process once. Returns its status, as _Child.status has it."""
        port = [] if self._port is None else ["--port", str(self._port)]
        try:
            child = self._child = _Child([*self._command, *port])
        except (OSError, subprocess.SubprocessError) as error:
            # For example, the system has no memory or no process left.
            logger.error("can't start the %s: %s", self._name, error)
            return CANNOT_START
        logger.info("the %s is process %d", self._name, child.pid)
        round_ends_at = time.monotonic() + HEARTBEAT_S
        while child.status is None:
            self._wait(round_ends_at)
            self._port = child.port or self._port
            if time.monotonic() >= round_ends_at:
                round_ends_at = time.monotonic() + HEARTBEAT_S
                self._kill_if_overdue(child)
        self._child = None
        return child.status

    def _wait(self, deadline: float) -> None:
        """Waits for a signal, for the child's pipe or for the deadline, and handles what has come."""
        signals, pipe = self._signals.fileno(), self._child.descriptors if self._child else []
        readable, _, _ = select.select([signals, *pipe], [], [], max(0.0, deadline - time.monotonic()))
        if signals in readable:
            for number in self._signals.recv(4096):
                if number != signal.SIGCHLD:
                    self._stop()
        if self._child and any(descriptor in readable for descriptor in pipe):
            self._child.read_pipe()
        self._reap()

    def _stop(self) -> None:
        if self._child:
            self._child.send(signal.SIGKILL if self._is_stopping else signal.SIGTERM)
        if not self._is_stopping:
            self._kill_at = time.monotonic() + self._stop_limit_s
        self._is_stopping = True

    def _kill_if_overdue(self, child: _Child) -> None:
        """Called every HEARTBEAT_S. Kills a process that is silent for too long, or takes too long to stop."""
        child.silent_s += HEARTBEAT_S if child.is_watched else 0.0
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            logger.error("the %s has not ended in %g s; killing it", self._name, self._stop_limit_s)
        elif child.silent_s > self._silence_limit_s:
            logger.error("the %s has been silent for %g s; killing it", self._name, child.silent_s)
        else:
            return
        child.send(signal.SIGKILL)

    def _reap(self) -> None:
        """Collects all children that have ended: the process, and orphans that became the supervisor's children."""
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
        """The status as a shell gives it, but 0 if the process ended by the signal that it was told to stop with."""
        if self._is_stopping and status == -signal.SIGTERM:
            return 0
        return status if status >= 0 else 128 - status


def _describe(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}"
