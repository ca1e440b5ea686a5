"""A model that is served under load: what the trials do to its processes, and what they expect of its clients."""

import contextlib
import itertools
import random
import subprocess
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.support.load import MAX_FAULTS, Ending, Load
from tests.e2e.waiting import WAIT_S, wait_until

NOTICE_LIMIT_S = 5.0
"""The limit until the clients of a killed process know, and until all of its child processes are gone."""
SLACK_S = 1.0
"""The limit between an event and the moment at which a busy client sees it."""


@dataclass
class Site:
    """A model that is served under load, and what was found there."""

    model: Path
    load: Load
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    """Counts of one kind of trial: `whole` answers of streams that ran when it began, calls `refused`, streams `cut`
    off.
    """
    times: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Measured times of one kind of trial, in seconds."""
    faults: list[str] = field(default_factory=list)
    _num_answers: int = 0
    _num_arrivals: int = 0

    def expect(self, is_so: bool, fault: str) -> None:
        if not is_so and len(self.faults) < MAX_FAULTS:
            self.faults.append(fault)

    def let_run(self) -> float:
        """Lets the load run for a while. Returns the time from which on take_endings() counts."""
        time.sleep(self.rng.uniform(0.3, 1.5))
        self.expect(not self.load.endings, f"ended before anything was done: {self.load.endings[:1]}")
        self.load.endings.clear()
        self._num_answers, self._num_arrivals = self.load.counts["answers"], len(self.load.arrivals)
        return time.monotonic()

    def longest_gap_s(self) -> float:
        """The longest gap between tokens of all streams since let_run()."""
        arrivals = self.load.arrivals[self._num_arrivals - 1 :]
        return max(after - before for before, after in itertools.pairwise(arrivals))

    def take_endings(self) -> list[Ending]:
        """Counts the whole answers since let_run(), and returns the calls that ended otherwise."""
        self.counts["whole"] += self.load.counts["answers"] - self._num_answers
        endings, self.load.endings = self.load.endings, []
        for ending in endings:
            self.expect(ending.code == "UNAVAILABLE", f"ended with {ending}")
        return endings

    def expect_refusals(self, asked_at: float) -> None:
        """Each call that ended was refused: by a server that drains, with advice, or because nothing listens."""
        for ending in self.take_endings():
            is_draining = ending.details == "the server is draining" and bool(ending.retry_after_s)
            self.expect(is_draining or ending.retry_after_s is None, f"refused without advice: {ending}")
            self.expect(not ending.num_tokens, f"cut off: {ending}")
            self.expect(ending.began_at > asked_at - SLACK_S, f"accepted, then refused: {ending}")
            self.counts["refused"] += 1

    def expect_cut_off(self, killed_at: float) -> None:
        """Each call that was open when its server was killed ends soon."""
        try:
            wait_until(lambda: min(self.load.open_since.values(), default=killed_at) >= killed_at, "", NOTICE_LIMIT_S)
        except AssertionError:
            hanging = sorted(number for number, since in list(self.load.open_since.items()) if since < killed_at)
            self.expect(False, f"clients {hanging} hang {NOTICE_LIMIT_S:g} s after their server was killed")
        self.times["noticed"].append(time.monotonic() - killed_at)

    def expect_answers(self) -> None:
        """Waits until each client has the answer that it waits for, also those that had to send their request again."""
        waits = [(number, self.load.answers_of[number]) for number in range(self.load.found["streams"])]
        wait_until(lambda: all(self.load.answers_of[number] > count for number, count in waits), "all answers")

    def processes(self, module: str = "") -> list[psutil.Process]:
        """The processes that serve the model and run this module or one inside it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                words = process.cmdline()
                # A setting of a child process is one word, --model=FOLDER.
                if any(str(self.model) in word for word in words) and any(word.startswith(module) for word in words):
                    found.append(process)
        return found

    def expect_gone(self, module: str = "") -> None:
        try:
            wait_until(lambda: not self.processes(module), "", NOTICE_LIMIT_S)
        except AssertionError:
            left = [" ".join(process.cmdline()[:4]) for process in self.processes(module)]
            self.expect(False, f"left behind: {left}")
            for process in self.processes(module):
                process.kill()

    def expect_status_0(self, process: "subprocess.Popen[bytes]") -> None:
        status = process.wait(WAIT_S)
        self.expect(status == 0, f"exit status {status}")
