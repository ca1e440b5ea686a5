"""Disturbances that leave processes silent. Each disturbs an engine of real processes and returns what it measured."""

import contextlib
import itertools
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from tandem_scheduler.processes.engine_side.front_end_pool import SILENCE_LIMIT_S as FRONT_END_LIMIT_S
from tandem_shared.host.supervisor import SILENCE_LIMIT_S as SUPERVISOR_LIMIT_S
from tandem_shared.rpc.grpc_options import KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS
from tests.chaos.harness.definitions import Found
from tests.chaos.support.load import Load
from tests.chaos.support.memory import front_ends
from tests.e2e.hosts import Host
from tests.e2e.link import Link
from tests.e2e.services import INFERENCE, Engine, HealthWatch
from tests.e2e.waiting import wait_until

NOTICED_WITHIN_S = 6.0
"""The promised limit until a worker that falls silent is noticed."""
RESUMED_WITHIN_S = 6.0
"""The promised limit until all streams go on, once the worker is in reach again."""
STALL_S = 0.5
PATIENCE_S = KEEPALIVE_TIMEOUT_MS / 1000
"""Clients wait this long at least. gRPC's pings to measure the network have this timeout, and one may be under way."""
SESSION_LIMIT_S = (KEEPALIVE_TIME_MS + KEEPALIVE_TIMEOUT_MS) / 1000 + 1
"""A worker ends the session of a scheduler that is silent for this long."""
UNDER_WAY_S = 1.0
"""After this time, all that a process sent before it froze has been read."""
START_S = 15.0
"""A worker of the small model starts in less than this, on a busy machine too."""
IDLE_S = 2.0
"""After this time without traffic gRPC no longer measures the network, whose pings would also find a silence."""
NUM_CONNECTIONS = 16
NUM_FRONT_ENDS = 3
"""One of them is frozen; when it ends, its connections go to the two others."""


@dataclass
class Scene:
    """What a trial works on."""

    engine: Engine
    load: Load
    random: random.Random
    link: Link
    host: Host | None
    calm_s: float
    is_busy: bool = False

    def wait_going_on(self) -> float:
        """Waits until each stream has tokens that are newer than this call. Returns the seconds."""
        began = time.monotonic()
        if self.is_busy:
            wait_until(lambda: min(self.load.heard_at) > began, "all streams go on")
        return time.monotonic() - began

    def are_silent(self, began: float) -> list[bool]:
        """For each stream, whether it has been silent since the disturbance, but for messages under way then."""
        return [heard_at < began + UNDER_WAY_S for heard_at in self.load.heard_at]

    def pause(self, least_s: float, most_s: float) -> None:
        time.sleep(self.random.uniform(least_s, most_s))


def lose_worker(
    scene: Scene,
    disturb: Callable[[], None],
    restore: Callable[[], None],
    resumed_within_s: float = RESUMED_WITHIN_S,
) -> Found:
    """Disturbs until the scheduler has noticed that its worker is lost, restores, and waits until all streams go on."""
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
        # If the loss was not noticed in time the process is gone, and the trial fails for the late notice.
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.resume()

    return lose_worker(scene, worker.suspend, thaw)


def freeze_worker_for_good(scene: Scene) -> Found:
    """The frozen worker is left to its supervisor, which kills and replaces it."""
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
    """Drops the packets of the one connection to the worker, as a NAT or a firewall does that has forgotten it."""
    host = scene.host
    assert host is not None
    sockets = psutil.Process(scene.engine.scheduler.process.pid).net_connections("tcp")
    ports = [each.laddr.port for each in sockets if each.raddr and each.raddr.ip.endswith(host.address)]
    try:
        return lose_worker(scene, lambda: host.drop_connections(ports), lambda: None)
    finally:
        host.recover()


def stall_link(scene: Scene) -> Found:
    """Stalls the way to the worker too briefly for the worker to be taken as lost."""
    losses = scene.engine.load().num_worker_losses
    before = len(scene.load.arrivals)
    scene.link.stall(STALL_S)
    resumed_s = scene.wait_going_on()
    gap_s = max(after - arrival for arrival, after in itertools.pairwise(scene.load.arrivals[before - 1 :]))
    assert gap_s > 0.8 * STALL_S, f"streams went on in a stall: the longest gap is {gap_s:.3f} s"
    return {"resumed_s": round(resumed_s, 3), "is_met": scene.engine.load().num_worker_losses == losses}


def freeze_front_end(scene: Scene) -> Found:
    """Freezes a front end, and thaws it before the pool or its clients take it as lost."""
    victim = choose_front_end(scene)
    assert victim is not None, "all clients are of one front end"
    began = time.monotonic()
    victim.suspend()
    scene.pause(2 * UNDER_WAY_S, PATIENCE_S - 1)
    was_silent = scene.are_silent(began)
    victim.resume()
    resumed_s = scene.wait_going_on()
    is_met = victim.is_running() and 0 < sum(was_silent) < len(was_silent)
    return {"resumed_s": round(resumed_s, 3), "streams_of_it": sum(was_silent), "is_met": is_met}


def freeze_front_end_for_good(scene: Scene) -> Found:
    """Freezes a front end until the pool kills it. Its clients are those that hear nothing while all others do."""
    while (victim := choose_front_end(scene)) is None:
        move_clients(scene)
    ends = list(scene.load.num_ends)
    began = time.monotonic()
    victim.suspend()
    time.sleep(FRONT_END_LIMIT_S / 2)
    was_silent = scene.are_silent(began)
    wait_until(lambda: not victim.is_running(), "the frozen front end is killed")
    noticed_s = time.monotonic() - began
    wait_until(lambda: len(front_ends(scene.engine)) == NUM_FRONT_ENDS, "another front end")
    scene.wait_going_on()
    has_ended = [now > old for now, old in zip(scene.load.num_ends, ends, strict=True)]
    return {
        "noticed_s": round(noticed_s, 3),
        "resumed_s": round(time.monotonic() - began - noticed_s, 3),
        "streams_of_it": sum(was_silent),
        "is_met": has_ended == was_silent and 0 < sum(was_silent) < len(was_silent),
    }


def kill_front_end_of_frozen_scheduler(scene: Scene) -> Found:
    """Kills a front end while the scheduler is frozen, so that its clients try again before the scheduler notices."""
    while (victim := choose_front_end(scene)) is None:
        move_clients(scene)
    scheduler = psutil.Process(scene.engine.scheduler.process.pid)
    scheduler.suspend()
    victim.kill()
    scene.pause(UNDER_WAY_S, PATIENCE_S - 1)
    scheduler.resume()
    wait_until(lambda: len(front_ends(scene.engine)) == NUM_FRONT_ENDS and not victim.is_running(), "another front end")
    return {"resumed_s": round(scene.wait_going_on(), 3), "is_met": True}


def choose_front_end(scene: Scene) -> psutil.Process | None:
    """A front end that has some of the load's clients, but not all of them. None if there is none."""
    port = scene.engine.scheduler.port

    def num_clients(process: psutil.Process) -> int:
        sockets = process.net_connections("tcp")
        return sum(each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port for each in sockets)

    # One connection is that of the harness itself.
    able = [process for process in front_ends(scene.engine) if 2 <= num_clients(process) <= NUM_CONNECTIONS - 1]
    return scene.random.choice(able) if able else None


def move_clients(scene: Scene) -> None:
    """Kills the front ends one after another, so that the clients of each move to others."""
    for process in front_ends(scene.engine):
        process.kill()
        wait_until(lambda: len(front_ends(scene.engine)) == NUM_FRONT_ENDS, "another front end")
        scene.wait_going_on()


def freeze_scheduler(scene: Scene) -> Found:
    """Freezes the scheduler, and thaws it before its clients or the worker take it as lost."""
    scheduler = psutil.Process(scene.engine.scheduler.process.pid)
    began = time.monotonic()
    scheduler.suspend()
    scene.pause(2 * UNDER_WAY_S, PATIENCE_S - 1)
    assert all(scene.are_silent(began))
    scheduler.resume()
    resumed_s = scene.wait_going_on()
    return {"resumed_s": round(resumed_s, 3), "is_met": True}


def freeze_scheduler_for_long(scene: Scene) -> Found:
    """Freezes the scheduler until the worker has ended the session and clients have given up, then thaws it."""
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
    """Freezes the scheduler, kills it and starts another, as its operator would."""
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
