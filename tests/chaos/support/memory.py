"""What an engine holds: the memory of its processes, sampled over time, and what is left when all calls have ended."""

import contextlib
import threading
import time

import psutil

from tandem.v1 import control_pb2
from tandem_scheduler.processes.engine_side.front_end_pool import MODULE as FRONT_END
from tests.e2e.services import Engine
from tests.e2e.waiting import wait_until

MIB = 1024 * 1024


class Watch:
    """Samples the memory and load of an engine in a thread of its own. A context manager."""

    def __init__(self, engine: Engine, interval_s: float = 1.0) -> None:
        self.times: list[float] = []
        """time.monotonic() of each sample."""
        self.rss: dict[str, list[int]] = {}
        """Resident bytes at each of the times, by the process's name."""
        self.loads: list[control_pb2.GetLoadResponse] = []
        self._engine = engine
        self._interval_s = interval_s
        self._processes = processes_of(engine)
        self._has_ended = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._sample_on, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Raises the error with which a sample failed, if one did."""
        self._has_ended.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def late_growth_mib(self) -> dict[str, float]:
        """By process: its peak in the second half less its peak in the first half."""
        half = len(self.times) // 2
        return {name: round((max(rss[half:]) - max(rss[:half])) / MIB, 1) for name, rss in self.rss.items()}

    def growth_mib(self) -> dict[str, float]:
        """By process: its peak less its first sample."""
        return {name: round((max(rss) - rss[0]) / MIB, 1) for name, rss in self.rss.items()}

    def _sample_on(self) -> None:
        try:
            while not self._has_ended.wait(self._interval_s):
                self.times.append(time.monotonic())
                self.loads.append(self._engine.load())
                for name, process in self._processes.items():
                    self.rss.setdefault(name, []).append(process.memory_info().rss)
        except Exception as error:
            self._error = error


def processes_of(engine: Engine) -> dict[str, psutil.Process]:
    """The services' own processes and the front ends, which are numbered in the order of their process ids."""
    named = {f"front end {number}": process for number, process in enumerate(front_ends(engine))}
    worker = engine.worker.serving()
    if worker.pid != engine.worker.process.pid:
        named["worker's supervisor"] = psutil.Process(engine.worker.process.pid)
    return {"scheduler": engine.scheduler.serving(), "worker": worker, **named}


def front_ends(engine: Engine) -> list[psutil.Process]:
    """The scheduler's front-end processes, in the order of their process ids."""
    found = []
    for child in psutil.Process(engine.scheduler.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if FRONT_END in child.cmdline():
                found.append(child)
    return sorted(found, key=lambda process: process.pid)


def faults_in_books(engine: Engine) -> list[str]:
    """What an engine whose calls have all ended still holds, or has counted wrong."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not engine.load().num_used_blocks, "no block is used", timeout_s=10.0)
    load = engine.load()
    left = {
        "waiting": load.num_waiting_sequences,
        "running": load.num_running_sequences,
        "used blocks": load.num_used_blocks,
        "lost blocks": load.num_total_blocks - load.num_free_blocks - load.num_cached_blocks - load.num_used_blocks,
        "worker losses": load.num_worker_losses,
    }
    return [f"{count} {what}" for what, count in left.items() if count]
