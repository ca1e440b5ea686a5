"""Workers killed at random moments under streams, and requests that take workers down among them.

Half of the kills are of the process that serves, which its supervisor starts again; the other half are of the
supervisor too, and the harness starts the service again, as whoever runs it would. Kills by the clock hit starting
workers too.
"""

import bisect
import contextlib
import math
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from benchmarks.common import percentiles
from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.support.engines import running_engine
from tests.chaos.support.load import Load
from tests.chaos.support.poisoned_worker import FAILS, VANISHES, poisonous_prompt
from tests.e2e.services import Engine, generate_request, wait_ready
from tests.e2e.waiting import POLL_INTERVAL_S, WAIT_S

MAX_LOSSES = {FAILS: 4, VANISHES: 6}
"""Workers that a poisonous request takes down at most: docs/decisions/0002-suspects.md."""
MAX_STARTS, MARGIN_S = 2.0, 3.0
"""The median time from a kill to the next token is so many times that in which a worker starts with nothing beside it,
and so much longer, at most.
"""


class Killer:
    """Kills an engine's worker again and again."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.times: list[float] = []
        """Of the kills, by time.monotonic."""
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._engine = engine
        self._random = random.Random(seed)

    def kill_within(self, least_s: float, most_s: float) -> None:
        # Evenly on a scale of logarithms, so that many come soon, while a worker starts.
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

    def tend(self, duration_s: float) -> None:
        """Lets time pass, and starts the service again where it gives up, as it does when it has been killed three
        times before it ever served.
        """
        deadline = time.monotonic() + duration_s
        while (left_s := deadline - time.monotonic()) > 0:
            if self._engine.worker.process.poll() is not None:
                self.counts["given up"] += 1
                if self._engine.worker.has_served:
                    self.faults.append("the supervisor gave up on a worker that has served")
                self._engine.worker.start()
            time.sleep(min(left_s, POLL_INTERVAL_S))

    def _serving(self) -> psutil.Process:
        """There is none between two lives."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = self._engine.worker.serving()
                if process.pid != self._engine.worker.process.pid:
                    return process
            self.tend(POLL_INTERVAL_S)
        raise AssertionError(f"no worker process in {WAIT_S:g} s")


def next_token_at(kill: float, arrivals: Sequence[float], min_gap_s: float) -> float | None:
    """When the first token came after a kill that was not under way already: the end of the first time without tokens
    that is as long as min_gap_s, which is shorter than any worker takes to start. None where there is none yet.
    arrivals ascend.
    """
    before = kill
    for index in range(bisect.bisect_right(arrivals, kill), len(arrivals)):
        if arrivals[index] - before >= min_gap_s:
            return arrivals[index]
        before = arrivals[index]
    return None


def waits(
    kills: Sequence[float], losses: Sequence[float], arrivals: Sequence[float], min_gap_s: float
) -> tuple[list[float], int]:
    """Seconds from each kill to the next token; and how many are left out, as another of the losses came before that
    token. losses hold the kills too.
    """
    seconds, num_overtaken = [], 0
    for kill in kills:
        end = next_token_at(kill, arrivals, min_gap_s)
        if any(kill < loss and (end is None or loss < end) for loss in losses):
            num_overtaken += 1
        elif end is not None:
            seconds.append(end - kill)
    return seconds, num_overtaken


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


def poison(engine: Engine, poisons: Sequence[tuple[str, int]], failures: Path, timeout_s: float) -> list[Found]:
    """Sends poisonous requests one after the other: their kinds, and the output tokens that they never get to."""
    found = []
    for kind, num_outputs in poisons:
        before = len(times_in(failures))
        request = generate_request(poisonous_prompt(kind, num_outputs), num_outputs + 100)
        stream = engine.stream(request, timeout_s=timeout_s)
        stream.join(timeout_s + WAIT_S)
        code, details = "OK", ""
        if stream.error is not None:
            code, details = stream.error.code().name, stream.error.details()
        losses = len(times_in(failures)) - before
        found.append({"kind": kind, "num_outputs": num_outputs, "losses": losses, "code": code, "details": details})
    return found


def times_in(failures: Path) -> list[float]:
    return [float(line) for line in failures.read_text().splitlines()]


def run(
    *,
    seed: int,
    num_streams: int,
    num_tokens: int,
    num_kills: int,
    interval_s: Sequence[float],
    num_starts: int,
    poisons: Sequence[tuple[str, int]] = (),
    is_patient: bool = False,
    worker_flags: Sequence[str] = (),
    scheduler_flags: Sequence[str] = (),
    timeout_s: float = 600.0,
) -> Found:
    """interval_s: least and most time from a kill to the next one, or where is_patient from the first token after it.
    timeout_s: the deadline of each call. Poisonous requests come when half of the kills are done.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-chaos-") as folder:
        failures = Path(folder, "failures")
        failures.touch()
        worker = ["tests.chaos.support.poisoned_worker", str(failures)] if poisons else ["tandem_worker"]
        with (
            running_engine(worker=worker, worker_flags=worker_flags, scheduler_flags=scheduler_flags) as engine,
            ThreadPoolExecutor(1) as threads,
        ):
            starts = starts_alone(engine, num_starts)
            min_gap_s = min(starts) / 2
            wait_ready(engine.channel)
            losses = engine.load().num_worker_losses
            with Load(engine.scheduler.address, num_streams, num_tokens=num_tokens, timeout_s=timeout_s) as load:
                killer = Killer(engine, seed)

                def wait_token() -> None:
                    deadline = time.monotonic() + timeout_s
                    while next_token_at(killer.times[-1], load.arrivals, min_gap_s) is None:
                        assert time.monotonic() < deadline, f"no token in {timeout_s:g} s after a kill"
                        killer.tend(POLL_INTERVAL_S)

                load.start()
                for number in range(num_kills):
                    if number == min(num_kills - 1, (num_kills + 1) // 2):
                        poisoning = threads.submit(poison, engine, poisons, failures, timeout_s)
                    killer.kill_within(*interval_s)
                    if is_patient or number == num_kills - 1:
                        wait_token()
                while not poisoning.done():
                    killer.tend(POLL_INTERVAL_S)
                load.finish()
            poisoned = poisoning.result()
            poison_times = times_in(failures)
            seconds, num_overtaken = waits(killer.times, killer.times + poison_times, load.arrivals, min_gap_s)
            books = engine.load()
    return {
        **load.found,
        "faults": load.faults + killer.faults,
        "kills": dict(killer.counts),
        "start_s": [round(each, 3) for each in starts],
        "wait_s": [round(each, 3) for each in seconds],
        "overtaken": num_overtaken,
        "poisons": poisoned,
        "lost_sessions": books.num_worker_losses - losses - len(poison_times),
        "preemptions": books.num_preemptions,
        "left": {
            "used blocks": books.num_used_blocks,
            "running": books.num_running_sequences,
            "waiting": books.num_waiting_sequences,
        },
    }


def rows(pieces: Sequence[Found]) -> list[Row]:
    return [*kill_rows(pieces), *poison_rows([piece for piece in pieces if piece["poisons"]])]


def kill_rows(pieces: Sequence[Found]) -> list[Row]:
    kills = _sum(piece["kills"] for piece in pieces)
    num_kills = kills["process"] + kills["supervisor"]
    num_sessions = sum(piece["lost_sessions"] for piece in pieces)
    starts = [each for piece in pieces for each in piece["start_s"]]
    seconds = [each for piece in pieces for each in piece["wait_s"]]
    num_overtaken = sum(piece["overtaken"] for piece in pieces)
    median_start = statistics.median(starts)
    wait = percentiles(seconds, digits=1)
    return [
        Row(
            "A killed worker ends no stream, and loses, doubles or changes no token",
            f"{num_kills} kills at random moments, {kills['supervisor']} of them with the supervisor, under "
            f"{_streams(pieces)}",
            f"{_outcome(pieces)}; {num_sessions} of the kills ended a session, the others hit a starting worker",
            # More losses than kills would be losses of Tandem's own.
            0 < num_sessions <= num_kills and all(_is_undisturbed(piece) for piece in pieces),
        ),
        Row(
            f"Tokens go on when a worker has started: half the times within {MAX_STARTS:g} starts and {MARGIN_S:g} s",
            f"the same kills, but for {num_overtaken} that another loss followed before a token; {len(starts)} starts "
            "of a worker with nothing else to do",
            f"from the kill to the next token p50 {wait.get('p50')} s, p99 {wait.get('p99')} s; a start takes "
            f"{median_start:.1f} s, the longest {max(starts):.1f} s; no stream waited for more than "
            f"{max(piece['longest_gap_s'] for piece in pieces):.1f} s",
            len(seconds) + num_overtaken == num_kills
            and len(seconds) > 0
            and statistics.median(seconds) <= MAX_STARTS * median_start + MARGIN_S,
        ),
    ]


def poison_rows(pieces: Sequence[Found]) -> list[Row]:
    poisons = [each for piece in pieces for each in piece["poisons"]]
    if not poisons:
        return []
    kinds = Counter(each["kind"] for each in poisons)
    codes = Counter(each["code"] for each in poisons)
    losses = [each["losses"] for each in poisons]
    return [
        Row(
            "A request that takes each worker down ends INTERNAL, and no other ends of it",
            f"{len(poisons)} such requests ({kinds[FAILS]} fail in a step, {kinds[VANISHES]} kill the process) among "
            f"{_streams(pieces)}, while workers are killed",
            f"{', '.join(f'{count} ended {code}' for code, count in codes.items())}, each after at most {max(losses)} "
            f"workers; of the others {_outcome(pieces)}",
            all(_is_found_out(each) for each in poisons) and all(_is_undisturbed(piece) for piece in pieces),
        )
    ]


def _is_found_out(poison: Found) -> bool:
    is_accused = poison["code"] == "INTERNAL" and "while it computed this sequence" in poison["details"]
    return is_accused and 0 < poison["losses"] <= MAX_LOSSES[poison["kind"]]


def _is_undisturbed(piece: Found) -> bool:
    """Whether each stream got its whole answer, at least once, and the scheduler has forgotten them all."""
    is_whole = piece["answers"] >= piece["streams"] and not piece["ended"] and not piece["wrong"]
    return is_whole and not piece["faults"] and not any(piece["left"].values())


def _streams(pieces: Sequence[Found]) -> str:
    answers, tokens = (sum(piece[name] for piece in pieces) for name in ("answers", "tokens"))
    return (
        f"{max(piece['streams'] for piece in pieces)} streams (greedy, seeded, two choices, log-probabilities; "
        f"float64): {answers:,} answers, {tokens:,} tokens"
    )


def _outcome(pieces: Sequence[Found]) -> str:
    ended = _sum(piece["ended"] for piece in pieces).total()
    wrong = sum(piece["wrong"] for piece in pieces)
    left = _sum(piece["left"] for piece in pieces)
    return f"{ended} ended, {wrong} had lost, doubled or changed tokens, {left.total()} rows or blocks were left behind"


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total


SETTINGS = [
    {},
    # Fewer blocks than the streams need.
    {"worker_flags": ["--num-blocks", "1000"]},
    {"scheduler_flags": ["--api-server-count", "2"]},
    {"scheduler_flags": ["--max-plans-in-flight", "4"]},
    {"worker_flags": ["--num-blocks", "1000"], "scheduler_flags": ["--api-server-count", "2"]},
]
POISONS = [[FAILS, 0], [VANISHES, 0], [FAILS, 20], [VANISHES, 20]]
FULL = {"num_streams": 64, "num_tokens": 300, "interval_s": [3.0, 30.0], "num_starts": 5}

PART = Part(
    name="kills",
    run=run,
    rows=rows,
    pieces={
        Form.SHORT: [
            {
                "seed": 1,
                "num_streams": 16,
                "num_tokens": 60,
                "num_kills": 3,
                "interval_s": [0.2, 1.5],
                "is_patient": True,
                "num_starts": 1,
                "poisons": [[FAILS, 3]],
                # Fewer than the streams need, so that sequences are preempted.
                "worker_flags": ["--num-blocks", "120"],
                "timeout_s": 90.0,
            }
        ],
        Form.LONG: [
            {
                "seed": 2,
                "num_streams": 64,
                "num_tokens": 150,
                "num_kills": 12,
                "interval_s": [3.0, 12.0],
                "num_starts": 3,
                "poisons": [[VANISHES, 0], [FAILS, 20]],
                "timeout_s": 300.0,
            }
        ],
        Form.FULL: [
            *({"seed": 100 + number, **FULL, "num_kills": 20, **SETTINGS[number % 5]} for number in range(10)),
            {"seed": 200, **FULL, "num_kills": 10, "poisons": POISONS},
            {"seed": 201, **FULL, "num_kills": 10, "poisons": POISONS, **SETTINGS[2]},
            {"seed": 202, **FULL, "num_kills": 10, "poisons": POISONS[2:], **SETTINGS[1]},
        ],
    },
)
