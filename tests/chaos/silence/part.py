"""Processes that are frozen (SIGSTOP) and connections between the services that are cut, stall or fall silent, under
streams and with an idle worker.

`disturbances.py` has what each kind of trial does; `drops.py` has the pieces that need a network of their own.
"""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.silence.disturbances import (
    IDLE_S,
    NOTICED_WITHIN_S,
    NUM_CONNECTIONS,
    NUM_FRONT_ENDS,
    PATIENCE_S,
    RESUMED_WITHIN_S,
    SESSION_LIMIT_S,
    STALL_S,
    Scene,
    cut_link,
    drop_packets,
    drop_packets_one_way,
    forget_connection,
    freeze_front_end,
    freeze_front_end_for_good,
    freeze_scheduler,
    freeze_scheduler_for_good,
    freeze_scheduler_for_long,
    freeze_worker,
    freeze_worker_for_good,
    kill_front_end_of_frozen_scheduler,
    silence_link,
    stall_link,
)
from tests.chaos.support.engines import running_engine
from tests.chaos.support.load import Load
from tests.e2e.hosts import one_host
from tests.e2e.link import Link


@dataclass(frozen=True)
class Kind:
    """A kind of trial. promise, tried: texts of the table. may_end: whether streams may end UNAVAILABLE; their requests
    are then sent again with their ids.
    """

    do: Callable[[Scene], Found]
    promise: str
    tried: str
    may_end: bool = False


NOTICED = f"is noticed within {NOTICED_WITHIN_S:g} s"
GO_ON = f"{NOTICED}, and all streams go on within {RESUMED_WITHIN_S:g} s of its return, token for token"
KINDS = {
    "worker frozen": Kind(
        freeze_worker, f"a worker that freezes {GO_ON}", "freezes, thawed up to 2 s after they were noticed"
    ),
    "worker frozen for good": Kind(
        freeze_worker_for_good,
        f"a worker that freezes and is replaced by its supervisor {NOTICED}, and all streams go on, token for token",
        "freezes for good",
    ),
    "link cut": Kind(
        cut_link, "when the connection to the worker is reset, all streams go on, token for token", "resets"
    ),
    "link silent": Kind(silence_link, f"a connection to the worker that brings nothing {GO_ON}", "silences of a proxy"),
    "link stalled": Kind(
        stall_link, f"stalls of {STALL_S * 1000:g} ms on the way to the worker lose no worker", "stalls of a proxy"
    ),
    "packets dropped": Kind(
        drop_packets, f"a network that drops all packets to and from the worker {GO_ON}", "silences by iptables"
    ),
    "packets dropped one way": Kind(
        drop_packets_one_way,
        f"a network that drops all packets to the worker, or all from it, {GO_ON}",
        "silences by iptables",
    ),
    "connection forgotten": Kind(
        forget_connection,
        f"a network that drops the packets of the connection to the worker, and of no other, {NOTICED}, and all "
        "streams go on over another, token for token",
        "connections forgotten by iptables",
    ),
    "front end frozen": Kind(
        freeze_front_end,
        f"clients of a front end that freezes for less than {PATIENCE_S:g} s wait, and lose nothing",
        "freezes",
    ),
    "front end frozen for good": Kind(
        freeze_front_end_for_good,
        "a front end that freezes is replaced; its clients get UNAVAILABLE and can send the request again with its id, "
        "and no others notice",
        "freezes for good",
        may_end=True,
    ),
    "front end killed beside a frozen scheduler": Kind(
        kill_front_end_of_frozen_scheduler,
        "clients of a front end that dies can send the request again with its id, even before the scheduler notices",
        "kills while the scheduler is frozen",
        may_end=True,
    ),
    "scheduler frozen": Kind(
        freeze_scheduler,
        f"clients of a scheduler that freezes for less than {PATIENCE_S:g} s wait, and lose nothing",
        "freezes",
    ),
    "scheduler frozen for long": Kind(
        freeze_scheduler_for_long,
        f"a worker ends the session of a frozen scheduler within {SESSION_LIMIT_S:g} s and takes its next one; clients "
        "wait for the thaw, or get UNAVAILABLE and can send the request again with its id",
        "freezes until then",
        may_end=True,
    ),
    "scheduler frozen for good": Kind(
        freeze_scheduler_for_good,
        "clients of a scheduler that freezes and is replaced get UNAVAILABLE and can send the request again with its "
        "id",
        "freezes, killed and started again",
        may_end=True,
    ),
}


def run(
    kinds: Sequence[str],
    trials: int,
    seed: int,
    *,
    idle_kinds: Sequence[str] = (),
    has_host: bool = False,
    num_front_ends: int = 0,
    num_streams: int = 16,
    num_tokens: int = 150,
    calm_s: float = 2.0,
) -> Found:
    """Does `trials` rounds of idle_kinds with an idle worker, then as many of `kinds` under streams. has_host: the
    worker runs on a host of its own; otherwise the scheduler reaches it over a link. calm_s: the longest pause between
    trials, and the longest that a disturbance goes on after it was noticed.
    """
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(contextlib.closing(Link()))
        host = stack.enter_context(one_host()) if has_host else None
        settings: dict[str, Any] = {"worker_host": host} if host else {"link": link}
        engine = stack.enter_context(
            running_engine(scheduler_flags=["--api-server-count", str(num_front_ends)], **settings)
        )
        may_end = [grpc.StatusCode.UNAVAILABLE] if any(KINDS[kind].may_end for kind in kinds) else ()
        load = stack.enter_context(
            Load(
                engine.scheduler.address,
                num_streams,
                num_tokens=num_tokens,
                num_connections=NUM_CONNECTIONS if num_front_ends else 1,
                may_end=may_end,
            )
        )
        scene = Scene(engine, load, random.Random(seed), link, host, calm_s)
        done = [try_out(scene, kind) for _ in range(trials) for kind in idle_kinds]
        load.start()
        scene.is_busy = True
        done += [try_out(scene, kind) for _ in range(trials) for kind in kinds]
        load.finish()
        return {"trials": done, "load": load.found, "used_blocks": engine.load().num_used_blocks}


def try_out(scene: Scene, kind: str) -> Found:
    scene.wait_going_on()
    scene.pause(0, scene.calm_s)
    if not scene.is_busy:
        time.sleep(IDLE_S)
    ends = list(scene.load.num_ends)
    found = KINDS[kind].do(scene)
    num_ended = sum(now > before for now, before in zip(scene.load.num_ends, ends, strict=True))
    trial = {"kind": kind, "is_busy": scene.is_busy, **found, "streams_ended": num_ended}
    print(f"  {trial}", flush=True)
    return trial


def rows(pieces: Sequence[Found]) -> list[Row]:
    found = []
    for name, kind in KINDS.items():
        own = [piece for piece in pieces if any(trial["kind"] == name for trial in piece["trials"])]
        if own:
            found.append(row_of(kind, own, [t for piece in own for t in piece["trials"] if t["kind"] == name]))
    return found


def row_of(kind: Kind, pieces: Sequence[Found], trials: Sequence[Found]) -> Row:
    """The row of one kind of trial. pieces: those that have trials of this kind."""
    loads = [piece["load"] for piece in pieces]
    wrong = sum(load["wrong"] for load in loads)
    codes = {code for load in loads for code in load["ended"]}
    answers = sum(load["answers"] for load in loads)
    streams = max(load["streams"] for load in loads)
    idle = sum(not trial["is_busy"] for trial in trials)
    told = [
        f"{what} {median_and_longest(trial[key] for trial in trials)}"
        for key, what in (("noticed_s", "noticed after"), ("resumed_s", "all went on after"))
        if key in trials[0]
    ]
    unmet = sum(not trial["is_met"] for trial in trials)
    num_ended = sum(trial["streams_ended"] for trial in trials)
    told.append(f"{num_ended} streams ended{' UNAVAILABLE and were tried again' if num_ended and kind.may_end else ''}")
    told.append(f"{wrong} wrong")
    if unmet:
        told.append(f"{unmet} trials not as promised")
    if leaked := sum(piece["used_blocks"] for piece in pieces):
        told.append(f"{leaked} blocks leaked")
    faults = [fault for load in loads for fault in load["faults"]]
    if faults:
        told.append(f"{len(faults)} faults, such as: {faults[0]}")
    is_met = (
        not unmet
        and not wrong
        and not leaked
        and not faults
        and all(load["answers"] >= load["streams"] for load in loads)
        and codes <= ({grpc.StatusCode.UNAVAILABLE.name} if kind.may_end else set())
    )
    where = f"under {streams} streams" + (f", {idle} of them before there were any" if idle else "")
    return Row(kind.promise, f"{len(trials)} {kind.tried}, {where}; {answers} answers", "; ".join(told), is_met)


def median_and_longest(seconds: Any) -> str:
    values = sorted(seconds)
    return f"{statistics.median(values):.2f} s (p50), {values[-1]:.2f} s (longest)"


WORKER = ["worker frozen", "link cut", "link silent", "link stalled"]
KILLED = "front end killed beside a frozen scheduler"
PART = Part(
    "silence",
    run,
    rows,
    {
        Form.SHORT: [
            {
                "kinds": ["worker frozen", "link cut", "link stalled"],
                "trials": 1,
                "seed": 1,
                "num_streams": 8,
                "num_tokens": 100,
                "calm_s": 0.3,
            },
        ],
        Form.LONG: [
            {"kinds": WORKER, "idle_kinds": ["worker frozen", "link silent"], "trials": 1, "seed": 1},
            {
                "kinds": ["front end frozen", "scheduler frozen"],
                "trials": 1,
                "seed": 3,
                "num_front_ends": NUM_FRONT_ENDS,
            },
            {"kinds": [KILLED, "front end frozen for good"], "trials": 1, "seed": 4, "num_front_ends": NUM_FRONT_ENDS},
        ],
        Form.FULL: [
            {"kinds": WORKER, "trials": 5, "seed": 11},
            {"kinds": [], "idle_kinds": ["worker frozen", "link silent"], "trials": 5, "seed": 12},
            {"kinds": ["worker frozen for good"], "trials": 5, "seed": 13},
            {"kinds": ["worker frozen for good"], "trials": 5, "seed": 14},
            {"kinds": ["front end frozen"], "trials": 5, "seed": 15, "num_front_ends": NUM_FRONT_ENDS},
            {"kinds": ["front end frozen for good"], "trials": 5, "seed": 16, "num_front_ends": NUM_FRONT_ENDS},
            {"kinds": [KILLED], "trials": 5, "seed": 23, "num_front_ends": NUM_FRONT_ENDS},
            {"kinds": ["scheduler frozen"], "trials": 5, "seed": 17},
            {"kinds": ["scheduler frozen"], "trials": 5, "seed": 18, "num_front_ends": NUM_FRONT_ENDS},
            {"kinds": ["scheduler frozen for long"], "trials": 5, "seed": 19},
            {"kinds": ["scheduler frozen for long"], "trials": 5, "seed": 20, "num_front_ends": NUM_FRONT_ENDS},
            {"kinds": ["scheduler frozen for good"], "trials": 5, "seed": 21},
            {"kinds": ["scheduler frozen for good"], "trials": 5, "seed": 22, "num_front_ends": NUM_FRONT_ENDS},
        ],
    },
)
