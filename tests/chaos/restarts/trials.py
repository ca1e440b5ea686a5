"""The ways in which services are ended and started again, each of which is one kind of trial."""

import contextlib
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil

from tandem.v1 import control_pb2
from tandem_scheduler.processes.engine_side.front_end_pool import MODULE as FRONT_END
from tests.chaos.restarts.serve import Serve
from tests.chaos.restarts.site import NOTICE_LIMIT_S, SLACK_S, Site
from tests.e2e.services import Engine
from tests.e2e.waiting import WAIT_S, wait_until

EXIT_LIMIT_S = 4.0
"""The limit until a scheduler without open calls has ended. It would kill front ends that did not leave after 5 s."""
SCHEDULER, WORKER = "tandem_scheduler", "tandem_worker"


def drain(site: Site, engine: Engine) -> None:
    """Drain: open streams end whole, new calls are refused, and the reply comes when the last stream has ended."""
    asked_at = site.let_run()
    engine.control.Drain(control_pb2.DrainRequest(), timeout=WAIT_S)
    late_s = time.monotonic() - site.load.arrivals[-1]
    site.times["late"].append(late_s)
    site.expect(late_s < SLACK_S, f"Drain returned {late_s:.1f} s after the last token")
    time.sleep(SLACK_S / 2)
    running = [number for number, since in list(site.load.open_since.items()) if since < asked_at]
    site.expect(not running, f"clients {running} still wait after Drain has returned")
    site.expect(time.monotonic() - site.load.arrivals[-1] > SLACK_S / 4, "tokens came after Drain had returned")
    site.expect_refusals(asked_at)
    engine.scheduler.signal(signal.SIGTERM)
    expect_scheduler_ends(site, engine)
    start_scheduler(site, engine)


def terminate_scheduler(site: Site, engine: Engine) -> None:
    asked_at = site.let_run()
    signal_scheduler(site, engine)
    expect_scheduler_ends(site, engine)
    site.expect_refusals(asked_at)
    start_scheduler(site, engine)


def terminate_past_grace(site: Site, engine: Engine) -> None:
    """SIGTERM with a grace too short for the open streams: those that are left are told so."""
    site.let_run()
    signal_scheduler(site, engine)
    expect_scheduler_ends(site, engine)
    for ending in site.take_endings():
        site.counts["cut" if ending.num_tokens else "refused"] += 1
        is_told = ending.details == "the server is stopping" and bool(ending.retry_after_s)
        site.expect(is_told or not ending.num_tokens, f"cut off without a word: {ending}")
    start_scheduler(site, engine)


def signal_scheduler(site: Site, engine: Engine) -> None:
    """Sends SIGTERM to all processes of the scheduler, as a supervisor does that signals a process group."""
    for process in site.processes(FRONT_END):
        process.terminate()
    engine.scheduler.signal(signal.SIGTERM)


def expect_scheduler_ends(site: Site, engine: Engine) -> None:
    """The scheduler ends with exit status 0, with all of its processes, soon after the last stream."""
    site.expect_status_0(engine.scheduler.process)
    late_s = time.monotonic() - site.load.arrivals[-1]
    site.times["ended"].append(late_s)
    site.expect(late_s < EXIT_LIMIT_S, f"the scheduler ended {late_s:.1f} s after the last token")
    site.expect_gone(SCHEDULER)


def start_scheduler(site: Site, engine: Engine) -> None:
    site.expect_gone(SCHEDULER)
    engine.channel.close()
    engine.scheduler.start()
    engine.connect()
    site.expect_answers()
    site.load.endings.clear()


def roll_worker(site: Site, engine: Engine) -> None:
    """SIGTERM to the worker's supervisor, then another worker at the same address. No stream notices."""
    site.let_run()
    engine.worker.signal(signal.SIGTERM)
    site.expect_status_0(engine.worker.process)
    replace_worker(site, engine)


def kill_supervisor(site: Site, engine: Engine) -> None:
    """Kills the worker's supervisor, with which its worker ends too."""
    site.let_run()
    engine.worker.process.kill()
    engine.worker.process.wait(WAIT_S)
    replace_worker(site, engine)


def replace_worker(site: Site, engine: Engine) -> None:
    site.expect_gone(WORKER)
    time.sleep(site.rng.uniform(0, 0.5))
    engine.restart_worker()
    site.expect_answers()
    site.times["longest gap"].append(site.longest_gap_s())
    endings = site.take_endings()
    site.expect(not endings, f"{len(endings)} streams ended, {endings[:1]}")


def kill_scheduler(site: Site, engine: Engine) -> None:
    """Kills the scheduler. Its front ends end too; the worker stays, ends the session and takes the next one."""
    site.let_run()
    worker = engine.worker.serving()
    killed_at = time.monotonic()
    engine.scheduler.process.kill()
    engine.scheduler.process.wait(WAIT_S)
    site.expect_cut_off(killed_at)
    site.expect_gone(SCHEDULER)
    site.counts["cut"] += sum(ending.num_tokens > 0 for ending in site.take_endings())
    start_scheduler(site, engine)
    site.expect(engine.worker.serving() == worker, "the worker was not the same afterwards")


def kill_front_end(site: Site, engine: Engine) -> None:
    """Kills one of several front ends. Streams of its own connections end; those of the others go on."""
    # Only the load's connections are left then.
    engine.channel.close()
    front_ends = site.processes(FRONT_END)
    port = engine.scheduler.port
    num_connections: dict[psutil.Process, int] = {}

    def have_settled() -> bool:
        for front_end in front_ends:
            connections = front_end.net_connections("tcp")
            num_connections[front_end] = sum(
                each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port for each in connections
            )
        return sum(num_connections.values()) == site.load.num_connections

    wait_until(have_settled, "the front ends have the load's connections alone")
    killed_at = site.let_run()
    victim = site.rng.choice([front_end for front_end, count in num_connections.items() if count])
    victim.kill()
    hit: set[int] = set()

    def all_noticed() -> bool:
        hit.update(ending.connection for ending in site.load.endings)
        open_calls = list(site.load.open_since.items())
        return len(hit) >= num_connections[victim] and not any(
            since < killed_at and number % site.load.num_connections in hit for number, since in open_calls
        )

    with contextlib.suppress(AssertionError):
        wait_until(all_noticed, "", NOTICE_LIMIT_S)
    site.expect(all_noticed(), "clients of a killed front end hang")
    site.times["noticed"].append(time.monotonic() - killed_at)
    wait_until(lambda: len(site.processes(FRONT_END)) == len(front_ends), "another front end")
    site.expect_answers()
    endings = site.take_endings()
    hit.update(ending.connection for ending in endings)
    site.expect(
        len(hit) == num_connections[victim], f"{len(hit)} connections lost streams, {num_connections[victim]} its own"
    )
    site.counts["cut"] += sum(ending.num_tokens > 0 for ending in endings)
    engine.connect()


def terminate_serve(site: Site, serve: Serve) -> None:
    asked_at = site.let_run()
    serve.process.terminate()
    site.expect_status_0(serve.process)
    site.expect_gone()
    site.expect_refusals(asked_at)
    start_serve(site, serve)


def kill_serve(site: Site, serve: Serve) -> None:
    site.let_run()
    killed_at = time.monotonic()
    serve.process.kill()
    serve.process.wait(WAIT_S)
    site.expect_cut_off(killed_at)
    site.expect_gone()
    site.counts["cut"] += sum(ending.num_tokens > 0 for ending in site.take_endings())
    start_serve(site, serve)


def start_serve(site: Site, serve: Serve) -> None:
    serve.start()
    site.expect_answers()
    site.load.endings.clear()


TRIALS: dict[str, Callable[[Site, Any], None]] = {
    "drain": drain,
    "scheduler terminated": terminate_scheduler,
    "grace passed": terminate_past_grace,
    "worker restarted": roll_worker,
    "supervisor killed": kill_supervisor,
    "scheduler killed": kill_scheduler,
    "front end killed": kill_front_end,
    "serve terminated": terminate_serve,
    "serve killed": kill_serve,
}
