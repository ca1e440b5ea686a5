"""Kills of an engine's worker and of what renders its chats, and how long a worker takes to start."""

import contextlib
import math
import random
import time
from collections import Counter

import psutil

from tandem_scheduler.front_end.chat.chat_renderer import MODULE as RENDERER
from tests.e2e.services import Engine
from tests.e2e.waiting import POLL_INTERVAL_S, WAIT_S


class Killer:
    """Kills an engine's worker again and again."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.times: list[float] = []
        """When each kill happened (time.monotonic())."""
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._engine = engine
        self._random = random.Random(seed)

    def kill_within(self, least_s: float, most_s: float) -> None:
        """Waits for a random time between the two, then kills the serving process, in half of the cases with its
        supervisor. All renderers of chats are killed too.
        """
        # The logarithm of the wait is uniform, so that many kills come soon, while a worker starts.
        self.tend(math.exp(self._random.uniform(math.log(least_s), math.log(most_s))))
        is_whole = self._random.random() < 0.5
        if is_whole:
            self.times.append(time.monotonic())
            self._engine.worker.kill()
            self._engine.worker.start()
        else:
            process = self._serving()
            self.times.append(time.monotonic())
            process.kill()
        self.counts["supervisor" if is_whole else "process"] += 1
        self._kill_renderers()

    def tend(self, duration_s: float) -> None:
        """Waits, and starts the service again if its supervisor gives up, as it does when three workers were killed
        before one ever served.
        """
        deadline = time.monotonic() + duration_s
        while (left_s := deadline - time.monotonic()) > 0:
            if self._engine.worker.process.poll() is not None:
                self.counts["given up"] += 1
                if self._engine.worker.has_served:
                    self.faults.append("the supervisor gave up on a worker that has served")
                self._engine.worker.start()
            time.sleep(min(left_s, POLL_INTERVAL_S))

    def _kill_renderers(self) -> None:
        for process in psutil.Process(self._engine.scheduler.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if RENDERER in process.cmdline():
                    process.kill()
                    self.counts["renderer"] += 1

    def _serving(self) -> psutil.Process:
        """The serving process. Waits for one while the supervisor is starting it."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = self._engine.worker.serving()
                if process.pid != self._engine.worker.process.pid:
                    return process
            self.tend(POLL_INTERVAL_S)
        raise AssertionError(f"no worker process in {WAIT_S:g} s")


def starts_alone(engine: Engine, num_starts: int) -> list[float]:
    """Seconds from the start of the worker's command until it serves, while nobody sends anything."""
    seconds = []
    for _ in range(num_starts):
        engine.worker.kill()
        started = time.monotonic()
        engine.worker.start()
        engine.worker.wait_listening()
        seconds.append(time.monotonic() - started)
    return seconds
