"""Both services as child processes of this one: start, wait until ready, restart the worker, stop, leave nothing.

Ports are free ones, told through files. The children have their settings as flags alone: TANDEM_* variables are for
whoever made the settings. On Linux the children die with the thread that started them, so that not even
kill -9 leaves them behind: start them from one that lives as long as they should.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from shared.config import SchedulerSettings, WorkerSettings
from shared.errors import TandemError
from shared.health_probe import health_status
from shared.process import child_environment, die_with_parent
from shared.settings import to_arguments

INFERENCE_SERVICE = "tandem.v1.InferenceService"
STOP_TIMEOUT_S = 35.0
"""Longer than a worker of several ranks gives itself."""
POLL_S = 0.05
MAX_RESTART_BACKOFF_S = 5.0


class ServiceFailed(TandemError):
    """A service process did not start, or ended on its own."""


class Services:
    """A worker and a scheduler process. A context manager: leaving it stops both."""

    def __init__(
        self,
        worker: WorkerSettings,
        scheduler: SchedulerSettings,
        log: IO[str] | None = None,
        worker_program: Sequence[str] = ("worker_service",),
    ) -> None:
        """log takes what both print; None is this process's stderr. worker_program: a module that takes the worker's
        flags, and the arguments that it wants before them.
        """
        self._worker_program = worker_program
        self._worker_settings = to_arguments(worker)
        self._scheduler_settings = to_arguments(scheduler)
        self._worker_host, self._scheduler_host = _connectable(worker.host), _connectable(scheduler.host)
        self._drain_grace_s = scheduler.drain_grace_s
        self._log = log
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-")
        self.worker: subprocess.Popen[bytes] | None = None
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.worker_address = ""
        self.address = ""

    def __enter__(self) -> "Services":
        try:
            self.start_worker(self._worker_settings)
            scheduler_port = self._start_scheduler()
        except BaseException:
            self.stop()
            raise
        self.address = f"{self._scheduler_host}:{scheduler_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_worker(self, arguments: Sequence[str]) -> None:
        module, *first = self._worker_program
        self.worker, port = self._start(module, [*first, *arguments])
        self.worker_address = f"{self._worker_host}:{port}"

    def restart_worker(self) -> None:
        """Starts a worker on the port of the one before, which is gone."""
        self.start_worker([*self._worker_settings, "--port", self.worker_address.rpartition(":")[2]])

    def wait_until_ready(self, timeout_s: float) -> None:
        """Until the scheduler serves with its worker. ServiceFailed if a process ends, or time does."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            if health_status(self.address, INFERENCE_SERVICE) == "SERVING":
                return
            time.sleep(POLL_S)
        raise ServiceFailed(f"the services are not ready after {timeout_s} s")

    def check_alive(self) -> None:
        for name, process in (("worker", self.worker), ("scheduler", self.scheduler)):
            if process is not None and process.poll() is not None:
                raise ServiceFailed(f"the {name} ended with status {process.returncode}")

    def supervise(self) -> None:
        """Starts the worker again whenever it ends; returns when the scheduler ends."""
        assert self.worker is not None and self.scheduler is not None, "only inside the context"
        backoff, started = POLL_S, time.monotonic()
        while self.scheduler.poll() is None:
            if self.worker.poll() is not None:
                print(f"tandem: the worker ended with status {self.worker.returncode}; restarting", file=sys.stderr)
                lived_long = time.monotonic() - started > 2 * MAX_RESTART_BACKOFF_S
                backoff = POLL_S if lived_long else min(2 * backoff, MAX_RESTART_BACKOFF_S)
                time.sleep(backoff)
                started = time.monotonic()
                try:
                    self.restart_worker()
                except ServiceFailed as error:
                    print(f"tandem: {error}", file=sys.stderr)
            time.sleep(POLL_S)

    def stop(self) -> None:
        """The scheduler first, so that it has its worker while it drains. An interrupt meanwhile kills both."""
        try:
            _end(self.scheduler, self._drain_grace_s + STOP_TIMEOUT_S)
            _end(self.worker, STOP_TIMEOUT_S)
        finally:
            for process in (self.scheduler, self.worker):
                if process is not None:
                    process.kill()
                    process.wait()
            self._folder.cleanup()

    def _start_scheduler(self) -> int:
        arguments = [*self._scheduler_settings, "--worker-address", self.worker_address]
        self.scheduler, port = self._start("scheduler_service", arguments)
        return port

    def _start(self, module: str, arguments: Sequence[str]) -> tuple[subprocess.Popen[bytes], int]:
        """A running service and the port that it listens on."""
        port_file = Path(self._folder.name) / f"{module}.port"
        port_file.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--port-file", str(port_file)],
            stderr=self._log,
            env=child_environment(),
            # Out of the terminal's reach: Ctrl-C is ours, and we stop them in order.
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        try:
            while not port_file.exists():
                if process.poll() is not None:
                    raise ServiceFailed(f"{module} ended with status {process.returncode} before it listened")
                time.sleep(POLL_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process, int(port_file.read_text())


def _end(process: "subprocess.Popen[bytes] | None", timeout_s: float) -> None:
    """Asks it to end, and waits."""
    if process is not None and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)


def _connectable(host: str) -> str:
    """Where to reach what listens on a host."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
