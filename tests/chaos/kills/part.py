"""Workers killed at random moments under streams, and requests that take workers down among them.

Half of the kills hit the serving process alone, which its supervisor starts again. The other half hit the supervisor
too, and the harness starts the service again, as its operator would. As the kills come at random times, some hit a
worker that is still starting.
"""

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tandem.v1 import control_pb2
from tests.chaos.harness.definitions import Form, Found, Part
from tests.chaos.kills.killer import Killer, starts_alone
from tests.chaos.kills.rows import rows
from tests.chaos.kills.waits import next_token_at, waits
from tests.chaos.support.engines import running_engine
from tests.chaos.support.load import KINDS, Load
from tests.chaos.support.poisoned_worker import FAILS, VANISHES, poisonous_prompt
from tests.e2e.services import Engine, generate_request, wait_ready
from tests.e2e.waiting import POLL_INTERVAL_S, WAIT_S


def poison(engine: Engine, poisons: Sequence[tuple[str, int]], failures: Path, timeout_s: float) -> list[Found]:
    """Sends poisonous requests one by one. poisons: the kind of each, and the output token that it never gets."""
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
    """When (time.monotonic()) poisonous requests took the worker down."""
    return [float(line) for line in failures.read_text().splitlines()]


def wait_token(killer: Killer, load: Load, min_gap_s: float, timeout_s: float) -> None:
    """Waits for the first token after the last kill."""
    deadline = time.monotonic() + timeout_s
    while next_token_at(killer.times[-1], load.arrivals, min_gap_s) is None:
        assert time.monotonic() < deadline, f"no token in {timeout_s:g} s after a kill"
        killer.tend(POLL_INTERVAL_S)


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
    """interval_s: the least and the most time from a kill to the next one or, if is_patient, from the first token after
    a kill to the next kill. timeout_s: the deadline of each call. Poisonous requests come when half of the kills are
    done.
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
                load.start()
                poisoned_from = min(num_kills - 1, (num_kills + 1) // 2)
                for number in range(num_kills):
                    if number == poisoned_from:
                        poisoning = threads.submit(poison, engine, poisons, failures, timeout_s)
                    killer.kill_within(*interval_s)
                    if is_patient or number == num_kills - 1:
                        wait_token(killer, load, min_gap_s, timeout_s)
                while not poisoning.done():
                    killer.tend(POLL_INTERVAL_S)
                load.finish()
            poisoned = poisoning.result()
            poison_times = times_in(failures)
            seconds, num_overtaken = waits(killer.times, killer.times + poison_times, load.arrivals, min_gap_s)
            books = engine.load()
    return {
        **load.found,
        "kinds": list(KINDS),
        "faults": load.faults + killer.faults,
        "kills": dict(killer.counts),
        "start_s": [round(each, 3) for each in starts],
        "wait_s": [round(each, 3) for each in seconds],
        "overtaken": num_overtaken,
        "poisons": poisoned,
        "lost_sessions": books.num_worker_losses - losses - len(poison_times),
        "preemptions": books.num_preemptions,
        "left": left_in(books),
    }


def left_in(books: control_pb2.GetLoadResponse) -> dict[str, int]:
    """What the scheduler still holds, which after the last answer should be nothing."""
    return {
        "used blocks": books.num_used_blocks,
        "running": books.num_running_sequences,
        "waiting": books.num_waiting_sequences,
    }


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
