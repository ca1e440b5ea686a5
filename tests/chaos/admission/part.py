"""Deadlines that pass while requests wait, under far more work than can be done: nothing starts after its deadline.

This is measured twice. The scheduler's recording has each call's deadline and the time before each plan, both by the
scheduler's clock: by it no plan may start a sequence that is late at all. The fake worker and the clients share another
clock, and note by it when a plan came and when a call's time was up: by it a start may be WIRE_S late, for the way that
calls and plans take.
"""

import json
import math
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tandem_scheduler.engine.recorder import replay
from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.support.crowd import Crowd, CrowdProcess, ends_of
from tests.chaos.support.fake_engine import capacity_per_s, running_fake_engine
from tests.chaos.support.memory import faults_in_books
from tests.e2e.waiting import WAIT_S

OVERLOAD = 20
STEP_MS, NUM_ROWS, NUM_TOKENS = 40, 16, 20
MAX_NUM_WAITING = 64
"""The last in the queue waits for 64 / 16 x 20 x 40 ms = 3.2 s."""
DEADLINES_S = (0.2, 0.5, 0.9, 1.3, 1.7, 2.1, 2.5, 2.9)
WIRE_S = 0.1
"""gRPC rounds up the time that a call has left, by 10 ms at most; the rest is for transport on a busy machine."""
MAX_LEAVING_S = 10.0
"""The most that a scheduler whose calls have all ended may take from SIGTERM to its exit."""


@dataclass
class Recorded:
    """What a recording says of deadlines, in numbers of sequences."""

    num_without_deadline: int = 0
    """Sequences whose calls have no deadline. There should be none, as each call of this part has one."""
    num_expired: int = 0
    num_started: int = 0
    num_started_late: int = 0
    """Sequences whose deadline had passed when their plan was made; all of a plan, if the scheduler was told no time.
    """


def run(front_ends: int, seconds: float) -> Found:
    rate_per_s = OVERLOAD * capacity_per_s(NUM_ROWS, NUM_TOKENS, STEP_MS)
    with TemporaryDirectory(prefix="tandem-chaos-") as folder:
        recording = Path(folder) / "recording"
        settings = {"max_num_waiting": MAX_NUM_WAITING, "record": recording}
        with running_fake_engine(step_ms=STEP_MS, num_rows=NUM_ROWS, front_ends=front_ends, **settings) as fake:
            crowd = Crowd(
                fake.engine.scheduler.address,
                num_calls=int(rate_per_s * seconds),
                num_tokens=NUM_TOKENS,
                rate_per_s=rate_per_s,
                deadlines_s=DEADLINES_S,
            )
            with CrowdProcess(crowd) as clients:
                calls = clients.calls()
            faults = faults_in_books(fake.engine)
            # The recording is whole once the scheduler has left in order.
            fake.engine.scheduler.signal(signal.SIGTERM)
            told_at = time.monotonic()
            fake.engine.scheduler.process.wait(WAIT_S)
            left_s = time.monotonic() - told_at
            deadlines = {call.number: call.deadline for call in calls}
            lateness = [at - deadlines[number] for number, at in fake.starts()]
        recorded = read_recording(recording.read_text().splitlines())
        difference = replay(recording).difference
    if difference:
        faults.append(f"the recording replays differently: {difference}")
    if left_s > MAX_LEAVING_S:
        faults.append(f"the scheduler waited {left_s:.0f} s for calls that had ended")
    return {
        "front_ends": front_ends,
        "calls": len(calls),
        "ends": ends_of(calls),
        "wrong": sum(not call.is_right for call in calls),
        "starts_seen_by_worker": len(lateness),
        "latest_start_s": round(max(lateness), 4),
        "recorded": vars(recorded),
        "faults": faults,
    }


def read_recording(lines: Iterable[str]) -> Recorded:
    recorded = Recorded()
    deadlines: dict[int, float] = {}
    now = None
    for line in lines:
        match json.loads(line):
            case {"call": "add", "arguments": requests}:
                for request in requests:
                    if request["deadline"] is None:
                        recorded.num_without_deadline += 1
                    else:
                        deadlines[request["sequence_id"]] = request["deadline"]
            case {"call": "expire", "arguments": [at], "answer": ended}:
                now = at
                recorded.num_expired += len(ended)
                continue
            case {"call": "schedule", "answer": {"added_rows": rows}}:
                recorded.num_started += len(rows)
                recorded.num_started_late += sum(
                    now is None or deadlines.get(row["sequence_id"], math.inf) <= now for row in rows
                )
        now = None
    return recorded


def rows(pieces: Sequence[Found]) -> list[Row]:
    total = {key: sum(piece["recorded"][key] for piece in pieces) for key in vars(Recorded())}
    num_calls = sum(piece["calls"] for piece in pieces)
    num_wrong = sum(piece["wrong"] for piece in pieces)
    latest_s = max(piece["latest_start_s"] for piece in pieces)
    layouts = " and ".join(str(piece["front_ends"]) for piece in pieces)
    faults = [fault for piece in pieces for fault in piece["faults"]]
    allowed = ("OK", "RESOURCE_EXHAUSTED QueueFull", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED DeadlinePassed")
    past = "before its deadline" if latest_s <= 0 else f"{1000 * latest_s:.0f} ms past it on its client's clock"
    return [
        Row(
            promise="Nothing starts after its call's deadline",
            tried=f"{num_calls} calls with deadlines of {DEADLINES_S[0]} to {DEADLINES_S[-1]} s at {OVERLOAD} times "
            f"capacity, with {layouts} front-end processes; {total['num_started']} sequences started",
            found=f"{total['num_started_late']} started late; the latest reached the worker {past} (allowed: "
            f"{1000 * WIRE_S:.0f} ms for the way); {total['num_expired']} ended while they waited; {num_wrong} wrong "
            f"answers{'; ' if faults else ''}{', '.join(faults)}",
            is_met=not total["num_started_late"]
            and not total["num_without_deadline"]
            and total["num_started"] > 0
            and total["num_started"] == sum(piece["starts_seen_by_worker"] for piece in pieces)
            and latest_s <= WIRE_S
            and not (num_wrong or faults)
            and all(set(piece["ends"]) <= set(allowed) for piece in pieces),
        )
    ]


PART = Part(
    "admission",
    run,
    rows,
    pieces={
        Form.SHORT: ({"front_ends": 2, "seconds": 2.0},),
        Form.LONG: ({"front_ends": 0, "seconds": 10.0},),
        Form.FULL: tuple({"front_ends": count, "seconds": 120.0} for count in (0, 2)),
    },
)
