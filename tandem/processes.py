"""The services as child processes of this one: starts them, waits until they are ready, stops them.

The worker's process is a supervisor, which starts the worker service again whenever it ends. The services listen on
free ports, which they write into files. They get their settings as flags alone; whoever made the settings has read the
TANDEM_* variables. On Linux the kernel kills the children when the thread that started them ends, so that not even
kill -9 leaves them behind: start them from a thread that lives as long as they should.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, NoReturn

from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.errors import TandemError
from tandem_shared.extras import require_extra
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.host.private_folder import PrivateFolder
from tandem_shared.host.process import child_environment, die_with_parent
from tandem_shared.options import to_arguments

INFERENCE_SERVICE = "tandem.v1.InferenceService"
START_TIMEOUT_S = 4 * 3600.0
"""How long a service may take until it listens: reading a large model from a slow disk takes long."""
STOP_TIMEOUT_S = 40.0
"""How long a service may take to end. Longer than a worker of several ranks, and its supervisor, wait before they
kill what is left.
"""
HURRY_TIMEOUT_S = 10.0
"""How long a service may take to end after a second signal, which tells it to wait for no request."""
KILL_TIMEOUT_S = 10.0
POLL_S = 0.05


class ServiceFailed(TandemError):
    """A service process did not start, or ended without being told to."""


class Services:
    """A worker and a scheduler process, as a context manager: entering it starts both, leaving it stops both."""

    def __init__(
        self,
        worker: WorkerSettings,
        scheduler: SchedulerSettings,
        log: IO[str] | None = None,
        worker_program: Sequence[str] = ("tandem_worker",),
        start_timeout_s: float = START_TIMEOUT_S,
        gateway: GatewaySettings | None = None,
    ) -> None:
        """log is a file for what both services print; None is this process's stderr. worker_program is a module that
        takes the worker's flags, and the arguments that come before those. start_timeout_s is how long each service
        may take until it listens. gateway: the settings of an HTTP gateway before the scheduler, if there is to be one.
        Raises ConfigError where the extra that the services need is not installed.
        """
        require_extra("worker")
        self._gateway_settings = gateway
        self._worker_program = worker_program
        self._worker_host, self._scheduler_host = _connectable(worker.host), _connectable(scheduler.host)
        self._drain_grace_s = scheduler.drain_grace_s
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._folder = PrivateFolder()
        # Unless the settings name a file for the secret, it is in a folder that only this process's user can read.
        named = worker.session_secret_file or scheduler.session_secret_file
        self.session_secret_file = named or str(self._folder.path / "session-secret")
        # The scheduler's metrics tell of the worker too, and two services can't have one port.
        self._worker_settings = replace(
            worker, session_secret_file=self.session_secret_file, metrics_port=None, health_port=0
        )
        self._scheduler_settings = replace(scheduler, session_secret_file=self.session_secret_file)
        self.worker: subprocess.Popen[bytes] | None = None
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.gateway: subprocess.Popen[bytes] | None = None
        self.worker_address = ""
        self.address = ""
        self.http_address = ""

    def __enter__(self) -> "Services":
        """Returns once the services listen. Raises ServiceFailed if one does not, ModelError for no model."""
        try:
            self._find_model()
            self._start_worker()
            self._start_scheduler()
            if self._gateway_settings:
                self._start_gateway(self._gateway_settings)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self, timeout_s: float) -> None:
        """Waits until the scheduler has its worker. Raises ServiceFailed if a process ends, or after timeout_s."""
        # Needs a package that a client alone does not have.
        from tandem_shared.rpc.health_probe import health_status

        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            if health_status(self.address, INFERENCE_SERVICE) == "SERVING":
                return
            time.sleep(POLL_S)
        raise ServiceFailed(f"the services are not ready after {timeout_s} s")

    def check_alive(self) -> None:
        """Raises ServiceFailed if a process has ended. The worker's process is the supervisor."""
        for name, process in (("worker", self.worker), ("scheduler", self.scheduler)):
            if process is not None and process.poll() is not None:
                raise ServiceFailed(f"the {name} ended with status {process.returncode}")

    def wait(self) -> NoReturn:
        """Waits until a service ends by itself, and then raises ServiceFailed. A gateway that ends is started again, as
        the scheduler's other clients need not know of it.
        """
        while True:
            self.check_alive()
            if self.gateway is not None and self.gateway.poll() is not None:
                status = self.gateway.returncode
                print(f"tandem: the gateway ended with status {status}; starting it again", file=sys.stderr)
                assert self._gateway_settings is not None
                port = int(self.http_address.rpartition(":")[2])
                self._start_gateway(replace(self._gateway_settings, http_port=port))
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Stops the scheduler, which first finishes the running requests, and then the worker. An interrupt meanwhile
        ends the requests at once; a second one kills the processes.
        """
        processes = (self.gateway, self.scheduler, self.worker)
        try:
            if self.gateway is not None:
                # It finishes its requests, as the scheduler does meanwhile, and takes no new ones.
                self.gateway.send_signal(signal.SIGTERM)
            _end(self.scheduler, self._drain_grace_s + STOP_TIMEOUT_S)
            _end(self.gateway, STOP_TIMEOUT_S)
            _end(self.worker, STOP_TIMEOUT_S)
        finally:
            left = [process.pid for process in processes if process and not _kill(process)]
            self._folder.close()
            if left:
                raise ServiceFailed(f"processes do not end, even killed: {left}")

    def _find_model(self) -> None:
        """Downloads a model of the hub in this process, where its progress is seen, for both services."""
        # Needs a package that a client alone does not have.
        from tandem_shared.model_folder import ALL_FILES, is_hub_id, resolve_model

        worker, scheduler = self._worker_settings, self._scheduler_settings
        if is_hub_id(worker.model):
            folder = str(resolve_model(worker.model, ALL_FILES, worker.revision))
            self._worker_settings = replace(worker, model=folder, revision="")
            self._scheduler_settings = replace(scheduler, model=folder, revision="")

    def _start_worker(self) -> None:
        module, *first = self._worker_program
        self.worker, port = self._start(module, [*first, *to_arguments(self._worker_settings)])
        self.worker_address = f"{self._worker_host}:{port}"

    def _start_scheduler(self) -> None:
        arguments = [*to_arguments(self._scheduler_settings), "--worker-address", self.worker_address]
        self.scheduler, port = self._start("tandem_scheduler", arguments)
        self.address = f"{self._scheduler_host}:{port}"

    def _start_gateway(self, settings: GatewaySettings) -> None:
        (self._folder.path / "tandem_gateway.port").unlink(missing_ok=True)
        arguments = to_arguments(replace(settings, scheduler_address=self.address))
        self.gateway, port = self._start("tandem_gateway", arguments)
        self.http_address = f"{_connectable(settings.host)}:{port}"

    def _start(self, module: str, arguments: Sequence[str]) -> tuple[subprocess.Popen[bytes], int]:
        """Starts a service; returns its process and the port that it listens on."""
        port_file = self._folder.path / f"{module}.port"
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--port-file", str(port_file)],
            stderr=self._log,
            env=child_environment(),
            # Ctrl-C in a terminal reaches only this process, which then stops the services in order.
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        try:
            deadline = time.monotonic() + self._start_timeout_s
            while not port_file.exists():
                if process.poll() is not None:
                    raise ServiceFailed(f"{module} ended with status {process.returncode} before it listened")
                if time.monotonic() > deadline:
                    raise ServiceFailed(f"{module} does not listen after {self._start_timeout_s:g} s")
                time.sleep(POLL_S)
        except BaseException:
            _kill(process)
            raise
        return process, int(port_file.read_text())


def _end(process: "subprocess.Popen[bytes] | None", timeout_s: float) -> None:
    """Tells a process to end and waits for that. At an interrupt it is told again: then it waits for no request."""
    if process is None or process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        _wait(process, timeout_s)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        _wait(process, HURRY_TIMEOUT_S)
        raise


def _kill(process: "subprocess.Popen[bytes]") -> bool:
    """Kills a process; returns whether it has ended."""
    process.kill()
    return _wait(process, KILL_TIMEOUT_S)


def _wait(process: "subprocess.Popen[bytes]", timeout_s: float) -> bool:
    """Waits for a process to end; returns whether it has."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _connectable(host: str) -> str:
    """The host under which a client on this machine reaches a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
