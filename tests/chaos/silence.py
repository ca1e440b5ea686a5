"""What goes silent without dying: processes that are frozen (SIGSTOP), and a connection between the services that is
cut, stalls or brings nothing any more. Under streams, and with a worker that idles.

Each kind of trial says what it does; `drops.py` has those that need a network of their own.
"""

import contextlib
import itertools
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

from scheduler_service.front_end_pool import MODULE as FRONT_END
from scheduler_service.front_end_pool import SILENCE_LIMIT_S as FRONT_END_LIMIT_S
from shared.grpc_options import KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS
from shared.supervisor import SILENCE_LIMIT_S as SUPERVISOR_LIMIT_S
from tests.chaos.engines import running_engine
from tests.chaos.load import Load
from tests.chaos.part import Form, Found, Part, Row
from tests.e2e.hosts import Host, one_host
from tests.e2e.link import Link
from tests.e2e.services import INFERENCE, Engine, HealthWatch
from tests.e2e.waiting import wait_until

NOTICED_WITHIN_S = 6.0
"""The promise, of a worker that falls silent."""
RESUMED_WITHIN_S = 6.0
"""Until all streams go on, once the worker is in reach again."""
STALL_S = 0.5
PATIENCE_S = KEEPALIVE_TIMEOUT_MS / 1000
"""Clients wait so long at least: beside tokens gRPC sends pings to measure the network, and one may be under way."""
SESSION_LIMIT_S = (KEEPALIVE_TIME_MS + KEEPALIVE_TIMEOUT_MS) / 1000 + 1
"""A worker ends the session of a scheduler that is silent for so long."""
UNDER_WAY_S = 1.0
"""What a process has sent before it froze is read by then."""
START_S = 15.0
"""A worker of the small model starts in less, on a busy machine too."""
IDLE_S = 2.0
"""Then gRPC has ended its measurements of the network, whose pings would find a silence too."""
NUM_CONNECTIONS = 16
NUM_FRONT_ENDS = 3
"""One is frozen, and what is dealt anew when it ends still goes to two."""


@dataclass
class Scene:
    """What a trial is given."""

    engine: Engine
    load: Load
    random: random.Random
    link: Link
    host: Host | None
    calm_s: float
    is_busy: bool = False

    def wait_going_on(self) -> float:
        """Until each stream has tokens that are newer than this call. Returns the seconds."""
        began = time.monotonic()
        if self.is_busy:
            wait_until(lambda: min(self.load.heard_at) > began, "all streams go on")
        return time.monotonic() - began

    def are_silent(self, began: float) -> list[bool]:
        """Of each stream whether it has brought nothing since a disturbance began, but for what was under way."""
        return [heard_at < began + UNDER_WAY_S for heard_at in self.load.heard_at]

    def pause(self, least_s: float, most_s: float) -> None:
        time.sleep(self.random.uniform(least_s, most_s))


def lose_worker(
    scene: Scene,
    disturb: Callable[[], None],
    restore: Callable[[], None],
    resumed_within_s: float = RESUMED_WITHIN_S,
) -> Found:
    """Until the scheduler has noticed, and all goes on after it."""
    losses = scene.engine.load().num_worker_losses
    with contextlib.closing(HealthWatch(scene.engine, INFERENCE)) as readiness:
        readiness.wait_status("SERVING")
        began = time.monotonic()
        disturb()
        try:
            wait_until(lambda: "NOT_SERVING" in readiness.statuses, "the loss is noticed")
            noticed_s = time.monotonic() - began
            scene.pause(0, scene.calm_s)
        finally:
            restore()
        restored = time.monotonic()
        readiness.wait_status("SERVING")
        scene.wait_going_on()
        resumed_s = time.monotonic() - restored
    is_in_time = noticed_s <= NOTICED_WITHIN_S and resumed_s <= resumed_within_s
    return {
        "noticed_s": round(noticed_s, 3),
        "resumed_s": round(resumed_s, 3),
        "is_met": is_in_time and scene.engine.load().num_worker_losses == losses + 1,
    }


def freeze_worker(scene: Scene) -> Found:
    worker = scene.engine.worker.serving()

    def thaw() -> None:
        # It is gone where nobody noticed in time, and then that is what is wrong.
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.resume()

    return lose_worker(scene, worker.suspend, thaw)


def freeze_worker_for_good(scene: Scene) -> Found:
    """Nobody ends it but its supervisor."""
    worker = scene.engine.worker.serving()
    found = lose_worker(scene, worker.suspend, lambda: None, SUPERVISOR_LIMIT_S + START_S)
    return found | {"is_met": found["is_met"] and not worker.is_running()}


def silence_link(scene: Scene) -> Found:
    return lose_worker(scene, scene.link.fall_silent, scene.link.recover)


def cut_link(scene: Scene) -> Found:
    return lose_worker(scene, scene.link.cut, lambda: None)


def drop_packets(scene: Scene, directions: Sequence[str] = Host.DIRECTIONS) -> Found:
    host = scene.host
    assert host is not None
    return lose_worker(scene, lambda: host.drop(directions), host.recover)


def drop_packets_one_way(scene: Scene) -> Found:
    return drop_packets(scene, [scene.random.choice(Host.DIRECTIONS)])


def forget_connection(scene: Scene) -> Found:
    """As a NAT or a firewall does: only its packets are dropped, and for the worker it is open until then."""
    host = scene.host
    assert host is not None
    sockets = psutil.Process(scene.engine.scheduler.process.pid).net_connections("tcp")
    ports = [each.laddr.port for each in sockets if each.raddr and each.raddr.ip.endswith(host.address)]
    try:
        return lose_worker(scene, lambda: host.drop_connections(ports), lambda: None)
    finally:
        host.recover()


def stall_link(scene: Scene) -> Found:
    """No worker is lost of it."""
    losses = scene.engine.load().num_worker_losses
    before = len(scene.load.arrivals)
    scene.link.stall(STALL_S)
    resumed_s = scene.wait_going_on()
    gap_s = max(after - arrival for arrival, after in itertools.pairwise(scene.load.arrivals[before - 1 :]))
    assert gap_s > 0.8 * STALL_S, f"streams went on in a stall: the longest gap is {gap_s:.3f} s"
    return {"resumed_s": round(resumed_s, 3), "is_met": scene.engine.load().num_worker_losses == losses}


def freeze_front_end(scene: Scene) -> Found:
    """Thawed before anybody takes it for lost: its clients wait."""
    victim = choose_front_end(scene)
    assert victim is not None, "all clients are of one front end"
    began = time.monotonic()
    victim.suspend()
    scene.pause(2 * UNDER_WAY_S, PATIENCE_S - 1)
    is_its = scene.are_silent(began)
    victim.resume()
    resumed_s = scene.wait_going_on()
    is_met = victim.is_running() and 0 < sum(is_its) < len(is_its)
    return {"resumed_s": round(resumed_s, 3), "streams_of_it": sum(is_its), "is_met": is_met}


def freeze_front_end_for_good(scene: Scene) -> Found:
    """The pool ends it. The clients of it are those that hear nothing while all others do."""
    while (victim := choose_front_end(scene)) is None:
        deal_anew(scene)
    ends = list(scene.load.num_ends)
    began = time.monotonic()
    victim.suspend()
    time.sleep(FRONT_END_LIMIT_S / 2)
    is_its = scene.are_silent(began)
    wait_until(lambda: not victim.is_running(), "the frozen front end is killed")
    noticed_s = time.monotonic() - began
    wait_until(lambda: len(front_ends(scene.engine)) == NUM_FRONT_ENDS, "another front end")
    scene.wait_going_on()
    has_ended = [now > old for now, old in zip(scene.load.num_ends, ends, strict=True)]
    return {
        "noticed_s": round(noticed_s, 3),
        "resumed_s": round(time.monotonic() - began - noticed_s, 3),
        "streams_of_it": sum(is_its),
        "is_met": has_ended == is_its and 0 < sum(is_its) < len(is_its),
    }


def front_ends(engine: Engine) -> list[psutil.Process]:
    children = psutil.Process(engine.scheduler.process.pid).children()
    found = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            if FRONT_END in child.cmdline():
                found.append(child)
    return found


def choose_front_end(scene: Scene) -> psutil.Process | None:
    """One that has clients of the load, while others have some too. None where all are one's."""
    port = scene.engine.scheduler.port

    def num_clients(process: psutil.Process) -> int:
        sockets = process.net_connections("tcp")
        return sum(each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port for each in sockets)

    # One connection is the engine's own.
    able = [process for process in front_ends(scene.engine) if 2 <= num_clients(process) <= NUM_CONNECTIONS - 1]
    return scene.random.choice(able) if able else None


def deal_anew(scene: Scene) -> None:
    """Kills the front ends, one after another: the clients of each move to others."""
    for process in front_ends(scene.engine):
        process.kill()
        wait_until(lambda: len(front_ends(scene.engine)) == NUM_FRONT_ENDS, "another front end")
        scene.wait_going_on()


def freeze_scheduler(scene: Scene) -> Found:
    """Thawed before anybody takes it for lost."""
    scheduler = psutil.Process(scene.engine.scheduler.process.pid)
    began = time.monotonic()
    scheduler.suspend()
    scene.pause(2 * UNDER_WAY_S, PATIENCE_S - 1)
    assert all(scene.are_silent(began))
    scheduler.resume()
    resumed_s = scene.wait_going_on()
    return {"resumed_s": round(resumed_s, 3), "is_met": True}


def freeze_scheduler_for_long(scene: Scene) -> Found:
    """Until the worker has ended the session, and clients have given up. Then it thaws."""
    scheduler = psutil.Process(scene.engine.scheduler.process.pid)
    ended = num_sessions_ended(scene)
    began = time.monotonic()
    scheduler.suspend()
    try:
        wait_until(lambda: num_sessions_ended(scene) > ended, "the worker ends the session")
        noticed_s = time.monotonic() - began
        scene.pause(0, scene.calm_s)
    finally:
        scheduler.resume()
    resumed_s = scene.wait_going_on()
    return {
        "noticed_s": round(noticed_s, 3),
        "resumed_s": round(resumed_s, 3),
        "is_met": noticed_s <= SESSION_LIMIT_S,
    }


def freeze_scheduler_for_good(scene: Scene) -> Found:
    """Whoever runs it kills it and starts another."""
    scene.engine.scheduler.signal(signal.SIGSTOP)
    scene.pause(1, 1 + scene.calm_s)
    scene.engine.channel.close()
    scene.engine.scheduler.kill()
    scene.engine.scheduler.start()
    scene.engine.connect()
    return {"resumed_s": round(scene.wait_going_on(), 3), "is_met": True}


def num_sessions_ended(scene: Scene) -> int:
    lines = scene.engine.worker.log_file.read_text().splitlines()
    return sum("session of scheduler" in line and line.endswith("ended") for line in lines)


@dataclass(frozen=True)
class Kind:
    """promise, tried: as the table has them. may_end: whether streams may end UNAVAILABLE, each of which is tried again
    with its id.
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
    """So many trials of each kind, in turn; first those with an idle worker, then those under streams. has_host: the
    worker runs on a host of its own, else the scheduler reaches it over a link. calm_s: between trials, and how long a
    disturbance goes on after it was noticed; at most.
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
    """Of the trials of one kind, and the pieces that they are of."""
    loads = [piece["load"] for piece in pieces]
    wrong = sum(load["wrong"] for load in loads)
    codes = {code for load in loads for code in load["ended"]}
    answers = sum(load["answers"] for load in loads)
    streams = max(load["streams"] for load in loads)
    idle = sum(not trial["is_busy"] for trial in trials)
    told = [
        f"{what} {of(trial[key] for trial in trials)}"
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


def of(seconds: Any) -> str:
    values = sorted(seconds)
    return f"{statistics.median(values):.2f} s (p50), {values[-1]:.2f} s (longest)"


WORKER = ["worker frozen", "link cut", "link silent", "link stalled"]
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
            {"kinds": ["front end frozen for good"], "trials": 1, "seed": 4, "num_front_ends": NUM_FRONT_ENDS},
        ],
        Form.FULL: [
            {"kinds": WORKER, "trials": 10, "seed": 11},
            {"kinds": [], "idle_kinds": ["worker frozen", "link silent"], "trials": 10, "seed": 12},
            {"kinds": ["worker frozen for good"], "trials": 5, "seed": 13},
            {"kinds": ["worker frozen for good"], "trials": 5, "seed": 14},
            {"kinds": ["front end frozen"], "trials": 10, "seed": 15, "num_front_ends": NUM_FRONT_ENDS},
            {"kinds": ["front end frozen for good"], "trials": 10, "seed": 16, "num_front_ends": NUM_FRONT_ENDS},
            {"kinds": ["scheduler frozen"], "trials": 10, "seed": 17},
            {"kinds": ["scheduler frozen"], "trials": 10, "seed": 18, "num_front_ends": NUM_FRONT_ENDS},
            {"kinds": ["scheduler frozen for long"], "trials": 10, "seed": 19},
            {"kinds": ["scheduler frozen for long"], "trials": 10, "seed": 20, "num_front_ends": NUM_FRONT_ENDS},
            {"kinds": ["scheduler frozen for good"], "trials": 10, "seed": 21},
            {"kinds": ["scheduler frozen for good"], "trials": 10, "seed": 22, "num_front_ends": NUM_FRONT_ENDS},
        ],
    },
)
