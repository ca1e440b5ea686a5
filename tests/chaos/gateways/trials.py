"""What is done to an engine and its gateways under streams, and what the clients must then find."""

import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from tests.chaos.gateways.load import BROKEN, UNAVAILABLE, Ending, HttpLoad
from tests.chaos.support.load import MAX_FAULTS, Load
from tests.e2e.gateway import GatewayProcess
from tests.e2e.services import Engine
from tests.e2e.waiting import WAIT_S, wait_until

NOTICE_LIMIT_S = 5.0
"""The limit until the clients of a killed process know."""
ANSWER_LIMIT_S = 300.0
"""The limit for whole answers of all clients at once, which take more than a minute on a busy machine."""
SLACK_S = 1.0
"""The limit between an event and the moment at which a busy client sees it."""


@dataclass
class Site:
    """An engine, gateways before it, clients of each gateway, and clients that speak gRPC."""

    engine: Engine
    gateways: list[GatewayProcess]
    loads: list[HttpLoad]
    """The clients of the gateway at the same place."""
    grpc_load: Load
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    """Counts of one kind of trial: streams `cut` off, calls `refused`, calls that were `open` when it began."""
    times: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    faults: list[str] = field(default_factory=list)

    def expect(self, is_so: bool, fault: str) -> None:
        if not is_so and len(self.faults) < MAX_FAULTS:
            self.faults.append(fault)

    def let_run(self) -> float:
        """Lets the load run until every gateway has streams in the middle, and for a random while. Returns the time."""
        for load in self.loads:
            before = len(load.arrivals)
            wait_until(lambda load=load, before=before: len(load.arrivals) > before + 10, "events of every gateway")
        time.sleep(self.rng.uniform(0.0, 1.0))
        self.expect_no_endings("before anything was done")
        now = time.monotonic()
        self.counts["open"] += sum(len(load.open_since) for load in self.loads)
        return now

    def expect_no_endings(self, when: str, loads: Sequence[HttpLoad] | None = None) -> None:
        """No call of these clients, by default of all, ended otherwise than with its answer; nor did a gRPC stream."""
        for load in self.loads if loads is None else loads:
            self.expect(not load.endings, f"{when} ended: {load.endings[:1]}")
            load.endings.clear()
        self.expect(not self.grpc_load.endings, f"{when} ended: {self.grpc_load.endings[:1]}")
        self.grpc_load.endings.clear()

    def expect_all_know(self, loads: Sequence[HttpLoad], killed_at: float) -> None:
        """Each call that was open at that time ends soon."""

        def know() -> bool:
            return all(min(load.open_since.values(), default=killed_at) >= killed_at for load in loads)

        try:
            wait_until(know, "", NOTICE_LIMIT_S)
        except AssertionError:
            self.expect(False, f"clients hang {NOTICE_LIMIT_S:g} s after their server was killed")
        self.times["noticed"].append(time.monotonic() - killed_at)

    def expect_answers(self) -> None:
        """Waits until each client has the answer that it waits for, also those that had to send their request again."""
        waits = [(load.answers_of, number, load.answers_of[number]) for load in self.loads for number in load.numbers]
        numbers = range(self.grpc_load.found["streams"])
        waits += [(self.grpc_load.answers_of, number, self.grpc_load.answers_of[number]) for number in numbers]
        try:
            wait_until(
                lambda: all(answers[number] > count for answers, number, count in waits), "all answers", ANSWER_LIMIT_S
            )
        except AssertionError:
            late = [number for answers, number, count in waits if answers[number] <= count]
            endings = [ending for load in self.loads for ending in load.endings if ending.number in late]
            raise AssertionError(f"no answers for {late}, whose last calls ended {endings[-3:]}") from None

    def take_endings(self, load: HttpLoad, how: str) -> list[Ending]:
        """The calls that ended otherwise than with their answer, each of which must have ended like this."""
        endings, load.endings = load.endings, []
        for ending in endings:
            self.expect(ending.how == how, f"ended with {ending}")
            # An error that ends a stream is an event, which has no headers.
            may_lack_advice = ending.how == BROKEN or ending.num_events > 0
            self.expect(ending.has_advice or may_lack_advice, f"refused without advice: {ending}")
            self.counts["cut" if ending.num_events else "refused"] += 1
        return endings

    def restart_scheduler(self) -> None:
        self.engine.channel.close()
        self.engine.scheduler.start()
        self.engine.connect()


def kill_worker(site: Site) -> None:
    """Every stream goes on, through whichever gateway it comes."""
    site.let_run()
    if site.rng.random() < 0.5:
        site.engine.worker.kill()
        site.engine.worker.start()
    else:
        site.engine.worker.serving().kill()
    killed_at = time.monotonic()
    site.expect_answers()
    site.times["answers"].append(time.monotonic() - killed_at)
    site.expect_no_endings("after a kill of the worker")


def kill_gateway(site: Site) -> None:
    """The clients of the one gateway lose their connections, its sequences are aborted, and nobody else notices."""
    # A gRPC stream has two choices at most.
    others = 2 * site.grpc_load.found["streams"] + sum(load.num_sequences for load in site.loads[1:])

    def num_sequences() -> int:
        load = site.engine.load()
        return int(load.num_running_sequences + load.num_waiting_sequences)

    site.let_run()
    wait_until(lambda: num_sequences() > others, "the gateway has sequences")
    killed_at = time.monotonic()
    site.gateways[0].kill()
    site.expect_all_know(site.loads[:1], killed_at)
    try:
        wait_until(lambda: num_sequences() <= others, "", NOTICE_LIMIT_S)
    except AssertionError:
        site.expect(False, f"{num_sequences()} sequences are left of a killed gateway and {others} others")
    site.times["aborted"].append(time.monotonic() - killed_at)
    site.gateways[0] = site.gateways[0].again()
    site.expect_answers()
    site.take_endings(site.loads[0], BROKEN)
    site.expect_no_endings("after another gateway was killed", site.loads[1:])


def kill_gateway_process(site: Site) -> None:
    """One of several processes of a gateway: the same, and it is replaced."""
    site.let_run()
    main = psutil.Process(site.gateways[0].process.pid)
    # One that was started later than the clients' connections may have none of them.
    serving = {child: len(found) for child in main.children() if (found := child.net_connections("tcp"))}
    max(serving, key=lambda child: serving[child]).kill()
    site.expect_answers()
    site.take_endings(site.loads[0], BROKEN)
    site.expect_no_endings("after another gateway's process was killed", site.loads[1:])
    wait_until(lambda: len(main.children()) >= len(serving), "the process is replaced")


def terminate_gateway(site: Site) -> None:
    """Open calls end whole, new ones are refused, and the exit status is 0."""
    asked_at = site.let_run()
    status = site.gateways[0].stop()
    site.expect(status == 0, f"exit status {status}")
    site.gateways[0] = site.gateways[0].again()
    site.expect_answers()
    _expect_refusals(site, site.loads[:1], asked_at, BROKEN)
    site.expect_no_endings("after another gateway ended", site.loads[1:])


def kill_scheduler(site: Site) -> None:
    """All streams end with 503, as a status or as the last event, and the same gateways then serve again."""
    site.let_run()
    killed_at = time.monotonic()
    site.engine.scheduler.kill()
    site.expect_all_know(site.loads, killed_at)
    site.restart_scheduler()
    site.expect_answers()
    for load in site.loads:
        site.take_endings(load, UNAVAILABLE)
    site.grpc_load.endings.clear()


def terminate_scheduler(site: Site) -> None:
    """Open streams end whole, new calls get 503 with advice, and the same gateways then serve again."""
    asked_at = site.let_run()
    site.engine.scheduler.signal(signal.SIGTERM)
    status = site.engine.scheduler.process.wait(WAIT_S)
    site.expect(status == 0, f"exit status {status}")
    site.restart_scheduler()
    site.expect_answers()
    _expect_refusals(site, site.loads, asked_at, UNAVAILABLE)
    site.grpc_load.endings.clear()


def _expect_refusals(site: Site, loads: Sequence[HttpLoad], asked_at: float, how: str) -> None:
    for load in loads:
        for ending in site.take_endings(load, how):
            site.expect(not ending.num_events, f"cut off: {ending}")
            site.expect(ending.began_at > asked_at - SLACK_S, f"accepted, then refused: {ending}")


TRIALS: dict[str, Callable[[Site], None]] = {
    "worker killed": kill_worker,
    "gateway killed": kill_gateway,
    "gateway's process killed": kill_gateway_process,
    "gateway terminated": terminate_gateway,
    "scheduler killed": kill_scheduler,
    "scheduler terminated": terminate_scheduler,
}
