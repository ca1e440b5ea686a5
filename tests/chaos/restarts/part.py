"""Services that are told to end, or are killed, under streams that never stop coming, and are started again.

An orderly end (Drain, SIGTERM) loses no stream that was accepted; a worker may come and go as it likes. Where a
scheduler or a front end is killed, its clients get UNAVAILABLE, and the same request, sent again with the same id, gets
its whole answer. Whatever ended leaves no process behind.
"""

import contextlib
import itertools
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

from tandem.v1 import control_pb2
from tandem_scheduler.processes.engine_side.front_end_pool import MODULE as FRONT_END
from tandem_shared.rpc.health_probe import health_status
from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.support.engines import random_model
from tests.chaos.support.load import MAX_FAULTS, Ending, Load
from tests.e2e.services import INFERENCE, REPOSITORY, Engine
from tests.e2e.waiting import WAIT_S, wait_until

NOTICE_LIMIT_S = 5.0
"""Within it the clients of a killed process hear of it, and what belonged to it is gone."""
EXIT_LIMIT_S = 4.0
"""Within it a scheduler that nobody waits for ends; front ends that did not leave would be killed after 5 s."""
SLACK_S = 1.0
"""Between what happens and what a busy client sees of it."""
SCHEDULER, WORKER = "tandem_scheduler", "tandem_worker"
STREAMS_PER_CONNECTION = 3


class Serve:
    """`tandem serve`, the parent of both services. Started again, it listens where it did."""

    def __init__(self, model: Path, flags: Sequence[str], log_file: Path) -> None:
        self._flags = [str(model), "--tokenizer", "embedded", "--dtype", "float64", "--num-threads", "1", *flags]
        self._log_file = log_file
        self._port = 0
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        with self._log_file.open("wb") as log:
            command = [sys.executable, "-m", "tandem.cli", "serve", *self._flags, "--port", str(self._port)]
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stderr=log)
        wait_until(lambda: self._find_port() or self.process.poll() is not None, "tandem serve listens")
        assert self.process.poll() is None, self._log_file.read_text()[-4000:]
        wait_until(lambda: health_status(self.address, INFERENCE) == "SERVING", "tandem serve is ready")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        print(self._log_file.read_text())

    def _find_port(self) -> bool:
        found = re.search(r"tandem serve: listening on 127\.0\.0\.1:(\d+)\n", self._log_file.read_text())
        self._port = int(found[1]) if found else self._port
        return found is not None


@dataclass
class Site:
    """A model that is served under load, and what was found there."""

    model: Path
    load: Load
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    """Of one kind of trial: `whole` answers of streams that ran into the end, calls `refused`, streams `cut` off."""
    times: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of one kind of trial, in seconds."""
    faults: list[str] = field(default_factory=list)
    _num_answers: int = 0
    _num_arrivals: int = 0

    def expect(self, is_so: bool, fault: str) -> None:
        if not is_so and len(self.faults) < MAX_FAULTS:
            self.faults.append(fault)

    def let_run(self) -> float:
        """For a while. Gives the time; what ends from then on is what take_endings() gives."""
        time.sleep(self.rng.uniform(0.3, 1.5))
        self.expect(not self.load.endings, f"ended before anything was done: {self.load.endings[:1]}")
        self.load.endings.clear()
        self._num_answers, self._num_arrivals = self.load.counts["answers"], len(self.load.arrivals)
        return time.monotonic()

    def longest_gap_s(self) -> float:
        """Between tokens of any stream, since let_run()."""
        arrivals = self.load.arrivals[self._num_arrivals - 1 :]
        return max(after - before for before, after in itertools.pairwise(arrivals))

    def take_endings(self) -> list[Ending]:
        self.counts["whole"] += self.load.counts["answers"] - self._num_answers
        endings, self.load.endings = self.load.endings, []
        for ending in endings:
            self.expect(ending.code == "UNAVAILABLE", f"ended with {ending}")
        return endings

    def expect_refusals(self, asked_at: float) -> None:
        """Whatever ended was refused: either by a server that drains, with advice, or because nobody listens."""
        for ending in self.take_endings():
            is_draining = ending.details == "the server is draining" and bool(ending.retry_after_s)
            self.expect(is_draining or ending.retry_after_s is None, f"refused without advice: {ending}")
            self.expect(not ending.num_tokens, f"cut off: {ending}")
            self.expect(ending.began_at > asked_at - SLACK_S, f"accepted, then refused: {ending}")
            self.counts["refused"] += 1

    def expect_cut_off(self, killed_at: float) -> None:
        """All calls that ran when their server was killed end soon."""
        try:
            wait_until(lambda: min(self.load.open_since.values(), default=killed_at) >= killed_at, "", NOTICE_LIMIT_S)
        except AssertionError:
            hanging = sorted(number for number, since in list(self.load.open_since.items()) if since < killed_at)
            self.expect(False, f"clients {hanging} hang {NOTICE_LIMIT_S:g} s after their server was killed")
        self.times["noticed"].append(time.monotonic() - killed_at)

    def expect_answers(self) -> None:
        """Each client gets the answer that it waits for, whatever it had to send again."""
        waits = [(number, self.load.answers_of[number]) for number in range(self.load.found["streams"])]
        wait_until(lambda: all(self.load.answers_of[number] > count for number, count in waits), "all answers")

    def processes(self, module: str = "") -> list[psutil.Process]:
        """Those that serve the model, of this module or one inside it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                words = process.cmdline()
                if str(self.model) in words and any(word.startswith(module) for word in words):
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


def drain(site: Site, engine: Engine) -> None:
    """The RPC: what runs ends whole, what comes is refused, and the reply comes when the last has ended."""
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
    """With a grace too short for what runs: the rest is told so."""
    site.let_run()
    signal_scheduler(site, engine)
    expect_scheduler_ends(site, engine)
    for ending in site.take_endings():
        site.counts["cut" if ending.num_tokens else "refused"] += 1
        is_told = ending.details == "the server is stopping" and bool(ending.retry_after_s)
        site.expect(is_told or not ending.num_tokens, f"cut off without a word: {ending}")
    start_scheduler(site, engine)


def signal_scheduler(site: Site, engine: Engine) -> None:
    """All of its processes get the signal, as from a supervisor that knows them all."""
    for process in site.processes(FRONT_END):
        process.terminate()
    engine.scheduler.signal(signal.SIGTERM)


def expect_scheduler_ends(site: Site, engine: Engine) -> None:
    """In order, with all of its processes, and soon after the last stream."""
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
    """SIGTERM to its supervisor, then another at the same address, and nobody notices."""
    site.let_run()
    engine.worker.signal(signal.SIGTERM)
    site.expect_status_0(engine.worker.process)
    replace_worker(site, engine)


def kill_supervisor(site: Site, engine: Engine) -> None:
    """It takes its worker along."""
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
    """-9: its front ends go too; the worker stays, ends the dead session and takes the next one."""
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
    """Streams of its own connections end; those of the others don't."""
    # The connections that are left are the load's.
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


def run(
    trials: Mapping[str, int],
    *,
    seed: int,
    streams: int = 24,
    tokens: int = 150,
    front_ends: int = 2,
    drain_grace_s: float = 60.0,
    tp_size: int = 1,
) -> Found:
    """trials: how many of each kind, which follow each other; those of `tandem serve` have no others beside them.
    tokens: of the shortest stream.
    """
    # Fewer rows than sequences, so that accepted streams wait for their first token when the end comes.
    flags = ["--api-server-count", str(front_ends), "--drain-grace-s", str(drain_grace_s)]
    flags += ["--max-num-seqs", str(streams * 2 // 3)]
    worker_flags = ["--tp-size", str(tp_size)]
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(random_model())
        services: Engine | Serve
        if "serve terminated" in trials or "serve killed" in trials:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-chaos-"))
            services = Serve(model, [*flags, *worker_flags], Path(folder, "log"))
            address = services.address
        else:
            services = Engine(model, scheduler_flags=flags, worker_flags=worker_flags)
            address = services.scheduler.address
        stack.callback(services.close)
        load = Load(
            address,
            streams,
            num_tokens=tokens,
            may_end=[grpc.StatusCode.UNAVAILABLE],
            num_connections=-(-streams // STREAMS_PER_CONNECTION),
        )
        stack.enter_context(load)
        load.start()
        rng = random.Random(seed)
        found = [try_out(Site(model, load, rng), services, kind, count) for kind, count in trials.items()]
        load.finish()
        return {"trials": found, "front_ends": front_ends, "tp_size": tp_size, "load": load.found}


def try_out(site: Site, services: Engine | Serve, kind: str, count: int) -> Found:
    for _ in range(count):
        TRIALS[kind](site, services)
    seconds = {what: [round(each, 3) for each in times] for what, times in site.times.items()}
    return {"kind": kind, "count": count, **site.counts, "seconds": seconds, "faults": site.faults}


PROMISES = {
    "drain": "Drain: accepted streams end whole, new ones get UNAVAILABLE with RetryInfo, then it returns",
    "scheduler terminated": "SIGTERM to the scheduler: accepted streams end whole, exit status 0, no process left",
    "grace passed": "SIGTERM, and the grace passes: what is left ends UNAVAILABLE, exit status 0, no process left",
    "worker restarted": "rolling restarts of the worker (SIGTERM, exit status 0, a new one): no stream notices",
    "supervisor killed": "the worker's supervisor killed with -9: its worker goes too, and no stream notices",
    "scheduler killed": "scheduler killed with -9: clients get UNAVAILABLE, no process left, a retry has its answer",
    "front end killed": "front end killed with -9: its own clients alone get UNAVAILABLE, a retry has its answer",
    "serve terminated": "SIGTERM to `tandem serve`: accepted streams end whole, exit status 0, no process left",
    "serve killed": "`tandem serve` killed with -9: clients get UNAVAILABLE, no process left, a retry has its answer",
}
MUST_HAPPEN = {
    "drain": ("whole", "refused"),
    "scheduler terminated": ("whole", "refused"),
    "grace passed": ("cut",),
    "scheduler killed": ("cut",),
    "front end killed": ("cut",),
    "serve terminated": ("whole", "refused"),
    "serve killed": ("cut",),
}
"""What must have been seen in each trial on average, or it tried nothing."""
WORDS = {
    "whole": "streams ended whole during it",
    "refused": "calls refused",
    "cut": "streams cut off",
    "late": "from the last token to its reply",
    "ended": "from the last token to the end",
    "noticed": "until all clients knew",
    "longest gap": "longest gap between tokens",
}


def rows(pieces: Sequence[Found]) -> list[Row]:
    found: dict[str, list[Found]] = defaultdict(list)
    for piece in pieces:
        for trial in piece["trials"]:
            found[trial["kind"]].append({**trial, "piece": piece})
    return [_row(kind, found[kind]) for kind in PROMISES if kind in found]


def _row(kind: str, trials: Sequence[Found]) -> Row:
    count = sum(trial["count"] for trial in trials)
    faults = [fault for trial in trials for fault in (*trial["faults"], *trial["piece"]["load"]["faults"])]
    sums = {name: sum(trial.get(name, 0) for trial in trials) for name in ("whole", "refused", "cut")}
    seen = [f"{number} {WORDS[name]}" for name, number in sums.items() if number]
    for what in ("late", "ended", "noticed", "longest gap"):
        times = [each for trial in trials for each in trial["seconds"].get(what, [])]
        if times:
            seen.append(f"{WORDS[what]}: {max(times):.2f} s at most")
    streams = sorted({trial["piece"]["load"]["streams"] for trial in trials})
    front_ends = sorted({trial["piece"]["front_ends"] for trial in trials})
    return Row(
        PROMISES[kind],
        f"{count} times under {' or '.join(map(str, streams))} streams, "
        f"with {' or '.join(map(str, front_ends))} front-end processes",
        "; ".join([f"{len(faults)} faults{f', such as: {faults[0]}' if faults else ''}", *seen]),
        not faults and all(sums[name] >= count for name in MUST_HAPPEN.get(kind, ())),
    )


PART = Part(
    "restarts",
    run,
    rows,
    {
        Form.SHORT: [
            {
                "trials": {"drain": 1, "scheduler terminated": 1, "worker restarted": 1, "scheduler killed": 1},
                "seed": 1,
                "streams": 12,
                "tokens": 100,
            }
        ],
        Form.LONG: [
            {
                "trials": {
                    "drain": 1,
                    "scheduler terminated": 2,
                    "worker restarted": 1,
                    "supervisor killed": 1,
                    "scheduler killed": 1,
                    "front end killed": 2,
                },
                "seed": 2,
                "streams": 18,
            },
            {"trials": {"grace passed": 2}, "seed": 3, "streams": 18, "front_ends": 0, "drain_grace_s": 0.3},
            {"trials": {"serve terminated": 1, "serve killed": 1}, "seed": 4, "streams": 12},
        ],
        Form.FULL: [
            {"trials": {"drain": 10}, "seed": 10},
            {"trials": {"scheduler terminated": 10}, "seed": 11},
            {"trials": {"scheduler terminated": 10, "drain": 5}, "seed": 12, "front_ends": 0},
            {"trials": {"grace passed": 10}, "seed": 13, "drain_grace_s": 0.3},
            {"trials": {"grace passed": 5}, "seed": 14, "front_ends": 0, "drain_grace_s": 0.3},
            {"trials": {"worker restarted": 10}, "seed": 15, "streams": 48},
            {"trials": {"supervisor killed": 10}, "seed": 16},
            {"trials": {"scheduler killed": 10}, "seed": 17},
            {"trials": {"scheduler killed": 10}, "seed": 18, "front_ends": 0},
            {"trials": {"front end killed": 10}, "seed": 19},
            {"trials": {"front end killed": 10}, "seed": 20, "front_ends": 3},
            {"trials": {"serve terminated": 10}, "seed": 21, "streams": 12},
            {"trials": {"serve killed": 10}, "seed": 22, "streams": 12},
            {"trials": {"serve terminated": 5, "serve killed": 5}, "seed": 23, "streams": 12, "tp_size": 2},
        ],
    },
)
