"""The two services as real processes, and streams read from them while things break.

The services choose their ports and write them into files. Each wait is bounded by WAIT_S, which is reached only if
something is wrong.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tests.e2e.hosts import Host
from tests.e2e.link import Link
from tests.e2e.waiting import WAIT_S, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
INFERENCE = "tandem.v1.InferenceService"
WORKER = "tandem.internal.v1.WorkerService"
SERVING = ("tandem_worker.service.process", "--serve")
"""Words that show in a command line that the process is a worker and not its supervisor: the module of the real worker,
or a flag of the tests' own workers.
"""

ServingStatus = health_pb2.HealthCheckResponse.ServingStatus


class Service:
    """One service process. When it is started again, it listens on the same port."""

    def __init__(
        self, module: str, flags: Sequence[str], folder: Path, before: Sequence[str] = (), host: Host | None = None
    ) -> None:
        """folder is for the port file and the log. `before` are arguments that come before the flags. The service runs
        and listens on `host`, or on this machine.
        """
        self._module = module
        self._flags = (*before, *flags, *(["--host", host.address] if host else []))
        self._enter = host.enter if host else []
        self._address = host.address if host else "127.0.0.1"
        self._port_file = folder / f"{module}.port"
        self.log_file = folder / f"{module}.log"
        self.port = 0
        self.start()

    def start(self) -> None:
        self._port_file.unlink(missing_ok=True)
        flags = [*self._flags, "--port", str(self.port), "--port-file", str(self._port_file)]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._enter, sys.executable, "-m", self._module, *flags],
                cwd=REPOSITORY,
                env={name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_listening(self) -> None:
        wait_until(lambda: self.has_served or self.process.poll() is not None, f"{self._module} listens")
        assert self.process.poll() is None, f"{self._module} ended:\n{self.log_file.read_text()[-4000:]}"
        self.port = int(self._port_file.read_text())

    @property
    def has_served(self) -> bool:
        """Whether it has listened since it was last started."""
        return self._port_file.exists()

    @property
    def address(self) -> str:
        return f"{self._address}:{self.port}"

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def serving(self) -> psutil.Process:
        """The process that serves; for a worker it is a child of the supervisor."""
        return serving_process(self.process.pid)

    def kill(self) -> None:
        """Kills the process with SIGKILL, which ends a frozen one too, and waits until its children are gone."""
        serving = [serving_process(self.process.pid)] if self.process.poll() is None else []
        self.process.kill()
        self.process.wait(WAIT_S)
        _, left = psutil.wait_procs(serving, WAIT_S)
        assert not left, f"{left} outlived the process that started it"


def free_port() -> int:
    """A port that was free a moment ago, for programs that can't take one themselves and say which."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def serving_process(pid: int) -> psutil.Process:
    """The worker service's own process, at `pid` or below it: `pid` may be its supervisor, or the supervisor's parent.
    Where there is no worker below, the process `pid`.
    """
    process = psutil.Process(pid)
    for child in process.children(recursive=True):
        # A child may end meanwhile.
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word in SERVING for word in child.cmdline()):
                return child
    return process


def wait_ready(channel: grpc.Channel) -> None:
    """Waits until the scheduler at the other end has a worker."""
    health = health_pb2_grpc.HealthStub(channel)

    def is_ready() -> bool:
        response = health.Check(health_pb2.HealthCheckRequest(service=INFERENCE), timeout=WAIT_S, wait_for_ready=True)
        return bool(response.status == ServingStatus.SERVING)

    wait_until(is_ready, "the scheduler is ready")


class Engine:
    """A worker and its scheduler, ready for requests, with stubs that talk to the scheduler."""

    def __init__(
        self,
        model: Path | str,
        *,
        worker_flags: Sequence[str] = (),
        scheduler_flags: Sequence[str] = (),
        dtype: str = "float64",
        link: Link | None = None,
        worker: Sequence[str] = ("tandem_worker",),
        worker_host: Host | None = None,
    ) -> None:
        """The scheduler reaches the worker over `link`, if one is given. `worker` is the worker's module, and the
        arguments before its flags. The worker runs on worker_host, or on this machine.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-e2e-")
        folder = Path(self._folder.name)
        common = ["--model", str(model)]
        if worker_host:
            # A worker that other hosts reach wants to see a secret.
            common += ["--session-secret-file", str(folder / "session-secret")]
        # A random model has no tokenizer. As prompts are token ids, any tokenizer will do.
        tokenizer = [] if model == "embedded" else ["--tokenizer", "embedded"]
        fixed = ["--device", "cpu", "--dtype", dtype, "--num-threads", "1"]
        module, *before = worker
        self.worker = Service(module, [*common, *fixed, *worker_flags], folder, before, worker_host)
        try:
            self.worker.wait_listening()
            worker_address = link.listen(self.worker.port) if link else self.worker.address
            flags = [*common, *tokenizer, "--worker-address", worker_address, *scheduler_flags]
            self.scheduler = Service("tandem_scheduler", flags, folder)
            self.connect()
        except BaseException:
            self.close()
            raise

    def connect(self) -> None:
        """Waits until the scheduler is ready and opens a channel to it."""
        self.scheduler.wait_listening()
        self.channel = grpc.insecure_channel(self.scheduler.address, CHANNEL_OPTIONS)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.control = control_pb2_grpc.ControlServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        wait_ready(self.channel)

    def load(self) -> control_pb2.GetLoadResponse:
        response: control_pb2.GetLoadResponse = self.control.GetLoad(control_pb2.GetLoadRequest(), timeout=WAIT_S)
        return response

    def restart_worker(self) -> None:
        self.worker.start()
        self.worker.wait_listening()

    def stream(self, request: inference_pb2.GenerateStreamRequest, timeout_s: float = WAIT_S) -> "Stream":
        return Stream(self.inference.GenerateStream(request, timeout=timeout_s))

    def close(self) -> None:
        """Kills what still runs and prints both logs, which pytest shows after a failure. Idempotent."""
        if hasattr(self, "channel"):
            self.channel.close()
        for name in ("scheduler", "worker"):
            service: Service | None = getattr(self, name, None)
            if service is not None and service.log_file.exists():
                service.kill()
                print(service.log_file.read_text())
        self._folder.cleanup()


class Stream:
    """A call that a thread reads, so that a test can act while it runs."""

    def __init__(self, call: "grpc.CallIterator[inference_pb2.GenerateStreamResponse]") -> None:
        self.call = call
        self.token_ids: list[int] = []
        self.finish: inference_pb2.Finish | None = None
        self.usage: inference_pb2.Usage | None = None
        self.error: grpc.RpcError | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for message in self.call:
                self.token_ids += message.token_ids
                if message.HasField("finish"):
                    self.finish = message.finish
                if message.HasField("usage"):
                    self.usage = message.usage
        except grpc.RpcError as error:
            self.error = error

    def wait_tokens(self, count: int) -> None:
        wait_until(lambda: len(self.token_ids) >= count or not self._thread.is_alive(), f"{count} tokens of a stream")
        assert len(self.token_ids) >= count, f"ended after {len(self.token_ids)} tokens: {self.error}"

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float = WAIT_S) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still running, with {len(self.token_ids)} tokens"

    def result(self, timeout_s: float = WAIT_S) -> list[int]:
        """Waits for the end; returns all tokens. The stream must have ended without an error."""
        self.join(timeout_s)
        assert self.error is None, self.error
        assert self.finish is not None
        assert self.usage is not None
        assert self.usage.num_output_tokens == len(self.token_ids)
        return self.token_ids


class HealthWatch:
    """All statuses that a server has reported for one service since the watch began."""

    def __init__(self, engine: Engine, service: str) -> None:
        self.statuses: list[str] = []
        self._call = engine.health.Watch(health_pb2.HealthCheckRequest(service=service))
        threading.Thread(target=self._read, daemon=True).start()
        wait_until(lambda: bool(self.statuses), f"a first health status of {service!r}")

    def _read(self) -> None:
        try:
            for response in self._call:
                self.statuses.append(ServingStatus.Name(response.status))
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.CANCELLED:
                self.statuses.append(error.code().name)

    def wait_status(self, status: str) -> None:
        wait_until(lambda: self.statuses[-1] == status, f"health status {status}; were {self.statuses}")

    def close(self) -> None:
        self._call.cancel()


def random_prompt(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    token_ids: list[int] = np.random.default_rng(seed).integers(0, vocab_size, length).tolist()
    return token_ids


def generate_request(
    token_ids: Sequence[int], max_tokens: int, *, temperature: float = 0.0, seed: int = 0, request_id: str | None = None
) -> inference_pb2.GenerateStreamRequest:
    return inference_pb2.GenerateStreamRequest(
        request_id=request_id,
        prompt=inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=token_ids)),
        sampling=inference_pb2.SamplingParams(temperature=temperature, top_k=0, top_p=1.0, seed=seed),
        stopping=inference_pb2.StoppingCriteria(max_tokens=max_tokens, ignore_eos=True),
    )
