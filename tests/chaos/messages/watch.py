"""Liveness probes of a service, and the memory of its processes, while hostile messages come."""

import contextlib
import math
import threading
import time

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem_scheduler.processes.engine_side.front_end_pool import MODULE as FRONT_END
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tests.chaos.messages.findings import OTHERS, PROCESS, Findings
from tests.chaos.support.memory import MIB

PROBE_INTERVAL_S = 0.25
MAX_PROBE_S = 5.0


class Watch:
    """Probes an address for liveness in a thread, and measures the memory of the processes behind it."""

    def __init__(self, address: str, root: int, found: Findings) -> None:
        self._found = found
        self._processes = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        self._channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._probe, daemon=True)
        self._thread.start()

    def _probe(self) -> None:
        health = health_pb2_grpc.HealthStub(self._channel)
        while not self._is_over.wait(PROBE_INTERVAL_S):
            began = time.monotonic()
            try:
                status = health.Check(health_pb2.HealthCheckRequest(), timeout=MAX_PROBE_S, wait_for_ready=True).status
                if status != health_pb2.HealthCheckResponse.SERVING:
                    self._found.note(OTHERS, f"a liveness probe was told {status}")
            except grpc.RpcError as error:
                took_s = time.monotonic() - began
                what = f"{error.code().name} after {took_s:.1f} s: {error.details()}"
                self._found.note(OTHERS, f"a liveness probe of {_name_of(self._processes[0])} ended {what}")
            self._found.num_probes += 1
            self._found.slowest_probe_s = max(self._found.slowest_probe_s, time.monotonic() - began)

    def memory(self) -> list[int]:
        return [process.memory_info().rss if process.is_running() else 0 for process in self._processes]

    def check_alive(self) -> None:
        for process in self._processes:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                self._found.note(PROCESS, f"process {process.pid} is gone")

    def note_growth(self, before: list[int]) -> None:
        for process, was, now in zip(self._processes, before, self.memory(), strict=True):
            name = _name_of(process)
            growth = round((now - was) / MIB, 1)
            self._found.growth_mib[name] = max(growth, self._found.growth_mib.get(name, -math.inf))

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._channel.close()


def _name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        line = " ".join(process.cmdline())
        return next(
            (
                name
                for name in (FRONT_END, "tandem_worker.service.process", "tandem_worker", "tandem_scheduler")
                if name in line
            ),
            "other",
        )
    return "gone"
