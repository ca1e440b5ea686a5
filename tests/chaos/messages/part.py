"""Malformed and hostile messages to both services over gRPC: every answer is a status of those that its RPC may give
(statuses.py), and nobody else notices.

A piece starts a worker and a scheduler. First every RPC of both ports, and of the socket between the scheduler's
processes, is called with hostile messages, while polite streams beside them are held against their truth and liveness
is asked for. Then the scheduler is drained and ended, and sessions with the worker follow, in each of which one message
is hostile (hostile_sessions.py). Memory is measured against what it was after the first fifth of each.
"""

import contextlib
import itertools
import math
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import psutil
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.internal.v1 import worker_pb2, worker_pb2_grpc
from tandem.v1 import control_pb2, inference_pb2
from tandem_scheduler.processes.engine_side.front_end_pool import MODULE as FRONT_END
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tandem_shared.step_codec import decode_info
from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.messages.hostile_bytes import draw
from tests.chaos.messages.hostile_calls import Case, cases_of, draw_cases, right_messages
from tests.chaos.messages.hostile_sessions import RPC as EXECUTE_STEPS
from tests.chaos.messages.hostile_sessions import Script, Sessions, draw_sessions, opening_of
from tests.chaos.messages.raw_calls import PATH as RAW_PATH
from tests.chaos.messages.raw_calls import call as raw_call
from tests.chaos.messages.raw_calls import raw_calls
from tests.chaos.messages.statuses import ATTACH, TABLE, allowed
from tests.chaos.support.engines import running_engine
from tests.chaos.support.load import Load
from tests.e2e.services import Engine
from tests.e2e.waiting import WAIT_S, wait_until

NUM_CALLERS = 8
NUM_CHANNELS = 4
DEADLINE_S = 0.5
"""Of calls that may take long, and of streams without an end."""
MAX_REPLIES = 100
HELD_S = 0.02
"""How long a front end's stream stays open after its last message, so that what it asked for begins."""
WARM_UP_SHARE = 0.2
MAX_GROWTH_MIB = 32
"""Of a process's resident memory over all messages after the warm-up. A leak of 4 KiB a message is more than that in
the 10,000 of a piece."""
PROBE_INTERVAL_S = 0.25
MAX_PROBE_S = 5.0
MAX_FAULTS = 20
HEX_BYTES = 400
NUM_DRAINS_SHARE = 100
NUM_RAW_SHARE = 30
"""Of so many calls one is a Drain, and one is made by hand."""
DRAIN = "/tandem.v1.ControlService/Drain"
MIB = 2**20
ANSWER, SESSION, OTHERS, PROCESS = "answer", "session", "others", "process"
"""Sorts of faults."""


@dataclass
class Findings:
    counts: Counter[str] = field(default_factory=Counter)
    """Answers by 'RPC STATUS'"""
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)
    """Faults by sort"""
    growth_mib: dict[str, float] = field(default_factory=dict)
    """The most of any process of that name"""
    slowest_probe_s: float = 0.0
    num_probes: int = 0

    def note(self, sort: str, fault: str) -> None:
        self.wrong[sort] += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(fault)
            print(f"messages: {sort}: {fault}", flush=True)


class Callers:
    """Makes calls of some address, from several threads over several connections."""

    def __init__(self, address: str) -> None:
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        self.channels = [grpc.insecure_channel(address, options) for _ in range(NUM_CHANNELS)]

    def call(self, case: Case, *, has_time: bool = False) -> tuple[StatusCode, str]:
        """has_time: the call may take long, though its RPC may be answered with DEADLINE_EXCEEDED."""
        is_short = StatusCode.DEADLINE_EXCEEDED in TABLE.get(case.rpc, ()) and not has_time
        compression = grpc.Compression.Gzip if case.kind == "compressed" else None
        channel = random.choice(self.channels)
        call: Any = channel.stream_stream(case.rpc)(
            _held(case) if case.rpc == ATTACH else iter(case.payloads),
            timeout=DEADLINE_S if is_short else WAIT_S,
            metadata=case.metadata,
            compression=compression,
            wait_for_ready=True,
        )
        try:
            for _ in itertools.islice(call, MAX_REPLIES):
                pass
            if call.is_active():
                call.cancel()
                return StatusCode.OK, "left after many replies"
        except grpc.RpcError:
            pass
        return call.code(), call.details() or ""

    def close(self) -> None:
        for channel in self.channels:
            channel.close()


def _held(case: Case) -> Iterator[bytes]:
    yield from case.payloads
    time.sleep(HELD_S)


class Watch:
    """Asks an address for liveness all along, and looks at the processes behind it."""

    def __init__(self, address: str, root: int, found: Findings) -> None:
        self._found = found
        self._processes = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        self._channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._probe, daemon=True)
        self._thread.start()

    def _probe(self) -> None:
        health = health_pb2_grpc.HealthStub(self._channel)
        while not self._is_over.wait(PROBE_INTERVAL_S):
            began = time.monotonic()
            try:
                status = health.Check(health_pb2.HealthCheckRequest(), timeout=MAX_PROBE_S, wait_for_ready=True).status
                if status != health_pb2.HealthCheckResponse.SERVING:
                    self._found.note(OTHERS, f"a liveness probe was told {status}")
            except grpc.RpcError as error:
                took_s = time.monotonic() - began
                what = f"{error.code().name} after {took_s:.1f} s: {error.details()}"
                self._found.note(OTHERS, f"a liveness probe of {_name_of(self._processes[0])} ended {what}")
            self._found.num_probes += 1
            self._found.slowest_probe_s = max(self._found.slowest_probe_s, time.monotonic() - began)

    def memory(self) -> list[int]:
        return [process.memory_info().rss if process.is_running() else 0 for process in self._processes]

    def check_alive(self) -> None:
        for process in self._processes:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                self._found.note(PROCESS, f"process {process.pid} is gone")

    def note_growth(self, before: list[int]) -> None:
        for process, was, now in zip(self._processes, before, self.memory(), strict=True):
            name = _name_of(process)
            growth = round((now - was) / MIB, 1)
            self._found.growth_mib[name] = max(growth, self._found.growth_mib.get(name, -math.inf))

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._channel.close()


def _name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        line = " ".join(process.cmdline())
        return next(
            (
                name
                for name in (FRONT_END, "tandem_worker.service.process", "tandem_worker", "tandem_scheduler")
                if name in line
            ),
            "other",
        )
    return "gone"


# A piece


def run(*, num_messages: int, seed: int, front_ends: int) -> Found:
    found = Findings()
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(
            running_engine(
                worker_flags=["--num-blocks", "1025"], scheduler_flags=["--api-server-count", str(front_ends)]
            )
        )
        worker = Callers(engine.worker.address)
        stack.callback(worker.close)
        stub = worker_pb2_grpc.WorkerServiceStub(worker.channels[0])
        info = decode_info(stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest()))
        opening = opening_of(info)
        watches = [Watch(service.address, service.process.pid, found) for service in (engine.worker, engine.scheduler)]
        for watch in watches:
            stack.callback(watch.close)
        num_sessions = num_messages * 3 // 10
        found_polite = _try_calls(engine, worker, opening, num_messages - num_sessions, seed, watches, found)
        watches[1].close()
        engine.scheduler.signal(signal.SIGTERM)
        if status := engine.scheduler.process.wait(WAIT_S):
            found.note(PROCESS, f"the scheduler's exit status is {status}")
        num_right = _try_sessions(worker.channels[0], Script(info), opening, num_sessions, seed, watches[0], found)
    return {
        "messages": sum(found.counts.values()),
        "answers": dict(sorted(found.counts.items())),
        "kinds": dict(sorted(found.kinds.items())),
        "wrong": dict(found.wrong),
        "faults": found.faults,
        "growth_mib": found.growth_mib,
        "probes": found.num_probes,
        "slowest_probe_s": round(found.slowest_probe_s, 3),
        "right_plans": num_right,
        "polite": found_polite,
    }


def _try_calls(
    engine: Engine,
    worker: Callers,
    opening: worker_pb2.OpenSession,
    count: int,
    seed: int,
    watches: list[Watch],
    found: Findings,
) -> Found:
    """All RPCs beside polite streams, then Drain. Gives what the polite streams found."""
    scheduler = Callers(engine.scheduler.address)
    addresses = dict.fromkeys(TABLE, scheduler) | {rpc: worker for rpc in TABLE if "WorkerService" in rpc}
    with contextlib.ExitStack() as stack:
        stack.callback(scheduler.close)
        if socket := _engine_socket(engine):
            addresses[ATTACH] = Callers(f"unix:{socket}")
            stack.callback(addresses[ATTACH].close)
        else:
            del addresses[ATTACH]
        model = engine.inference.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=WAIT_S)
        makers = right_messages(opening, model.fingerprint)
        num_drains = max(5, count // NUM_DRAINS_SHARE)
        raws = draw(raw_calls, max(5, count // NUM_RAW_SHARE), seed)
        num_cases = count - num_drains - len(raws)
        cases = draw_cases([rpc for rpc in addresses if rpc != DRAIN], makers, num_cases, seed)
        drains = draw(cases_of(DRAIN, makers), num_drains, seed)

        def attempt(case: Case) -> None:
            callers = addresses.get(case.rpc, scheduler)
            if callers is scheduler and not case.rpc.startswith("/tandem") and sum(map(len, case.payloads)) % 3 == 0:
                callers = worker
            may_be = allowed(case.rpc, case.kind, case.payloads[0] if case.payloads else None, model)
            code, details = callers.call(case)
            if code is StatusCode.DEADLINE_EXCEEDED and code not in may_be:
                # A busy machine: the answer is another one, given the time.
                code, details = callers.call(case, has_time=True)
            name = case.rpc if case.rpc in TABLE else "unknown method"
            found.counts[f"{name} {code.name}"] += 1
            found.kinds[case.kind] += 1
            if code not in may_be:
                found.note(ANSWER, _describe(case, seed, code, details))

        def attempt_raw(drawn: tuple[Any, bytes]) -> None:
            status = raw_call(engine.scheduler.address, *drawn)
            found.counts[f"no gRPC call {status}"] += 1
            found.kinds["no gRPC call"] += 1
            has_right_headers = not drawn[0]
            if status == "SILENCE" or (has_right_headers and status not in {code.name for code in TABLE[RAW_PATH]}):
                found.note(ANSWER, f"{RAW_PATH} by hand answered {status} to {drawn}, seed {seed}")

        with Load(engine.scheduler.address, 4, num_tokens=20) as polite, ThreadPoolExecutor(NUM_CALLERS) as pool:
            polite.start()
            num_warm = int(len(cases) * WARM_UP_SHARE)
            list(pool.map(attempt, cases[:num_warm]))
            before = [watch.memory() for watch in watches]
            list(pool.map(attempt, cases[num_warm:]))
            list(pool.map(attempt_raw, raws))
            polite.finish(WAIT_S)
            for watch, memory in zip(watches, before, strict=True):
                watch.note_growth(memory)
                watch.check_alive()
            found_polite = polite.found
        _check_books(engine, found)
        for case in drains:
            attempt(case)
        _check_drained(engine, found)
        return found_polite


def _check_books(engine: Engine, found: Findings) -> None:
    def is_empty() -> bool:
        load = engine.load()
        return load.num_waiting_sequences == load.num_running_sequences == load.num_used_blocks == 0

    try:
        wait_until(is_empty, "nothing is left in the scheduler")
    except AssertionError:
        found.note(PROCESS, f"left in the scheduler: {engine.load()}")
    if losses := engine.load().num_worker_losses:
        found.note(PROCESS, f"the scheduler lost its worker {losses} times")


def _check_drained(engine: Engine, found: Findings) -> None:
    engine.control.Drain(control_pb2.DrainRequest(), timeout=WAIT_S)
    if not engine.control.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=WAIT_S).draining:
        found.note(ANSWER, "Drain left a server that does not drain")


def _try_sessions(
    channel: grpc.Channel,
    script: Script,
    opening: worker_pb2.OpenSession,
    count: int,
    seed: int,
    watch: Watch,
    found: Findings,
) -> int:
    """Gives how many right plans had their true tokens."""
    sessions = Sessions(channel, script, opening)
    num_right, before = 0, watch.memory()
    for number, each in enumerate(draw_sessions(script, opening, count, seed)):
        if number == int(count * WARM_UP_SHARE):
            before = watch.memory()
        outcome = sessions.attempt(each)
        num_right += outcome.num_right
        found.counts[f"{EXECUTE_STEPS} {outcome.code.name}"] += 1
        found.kinds[f"session: {each.kind}"] += 1
        if outcome.fault:
            case = Case(EXECUTE_STEPS, f"{each.kind} after {each.num_plans} plans", (each.payload,))
            found.note(SESSION, f"{outcome.fault}: {_describe(case, seed, outcome.code, outcome.details)}")
    watch.note_growth(before)
    watch.check_alive()
    return num_right


def _engine_socket(engine: Engine) -> str | None:
    for child in psutil.Process(engine.scheduler.process.pid).children():
        line = child.cmdline()
        if "--engine-socket" in line:
            return line[line.index("--engine-socket") + 1]
    return None


def _describe(case: Case, seed: int, code: StatusCode, details: str) -> str:
    data = [
        payload[:HEX_BYTES].hex() + (f"... {len(payload)} bytes" if len(payload) > HEX_BYTES else "")
        for payload in case.payloads
    ]
    metadata = f", metadata {str(case.metadata)[:200]}" if case.metadata else ""
    return (
        f"{case.rpc} answered {code.name} ({details[:200]}) to {case.kind!r}{metadata}, seed {seed}: {' | '.join(data)}"
    )


def rows(pieces: Sequence[Found]) -> list[Row]:
    def total(name: str) -> int:
        return sum(piece[name] for piece in pieces)

    def wrong(sort: str) -> int:
        return sum(piece["wrong"].get(sort, 0) for piece in pieces)

    answers = {name for piece in pieces for name in piece["answers"]}
    num_rpcs = len({name.partition(" ")[0] for name in answers if name.startswith("/")})
    num_sessions = sum(n for piece in pieces for kind, n in piece["kinds"].items() if kind.startswith("session: "))
    polite = [piece["polite"] for piece in pieces]
    num_polite, num_ended = sum(each["answers"] for each in polite), sum(sum(each["ended"].values()) for each in polite)
    num_wrong = sum(each["wrong"] for each in polite)
    slowest = max(piece["slowest_probe_s"] for piece in pieces)
    growth = max(each for piece in pieces for each in piece["growth_mib"].values())
    num_messages = total("messages")
    return [
        Row(
            "whatever a message holds, it is answered with a status that its RPC may give: never UNKNOWN, and INTERNAL "
            "for no input",
            f"{num_messages} hostile messages to {num_rpcs} RPCs of both services",
            f"{wrong(ANSWER)} other answers",
            wrong(ANSWER) == 0 and num_rpcs >= len(TABLE) - 1,
        ),
        Row(
            "a step plan that can't be followed ends its session alone, whole, and the next one computes what is right",
            f"{num_sessions} sessions with a hostile message, {total('right_plans')} right plans before it",
            f"{wrong(SESSION)} with a wrong status or other tokens",
            wrong(SESSION) == 0 and total("right_plans") > 0,
        ),
        Row(
            "nobody else notices hostile messages: streams go on, liveness is answered",
            f"{num_polite} answers of streams beside them, {total('probes')} probes of both services",
            f"{num_wrong} wrong, {num_ended} ended, the slowest probe {slowest:.2f} s, {wrong(OTHERS)} other faults",
            num_polite > 0 and num_wrong == num_ended == wrong(OTHERS) == 0,
        ),
        Row(
            f"no message ends a process, costs the scheduler its worker or is kept: {MAX_GROWTH_MIB} MiB at most",
            f"{len(pieces)} worker and scheduler pairs, {num_messages // len(pieces)} messages each",
            f"{wrong(PROCESS)} processes ended or sessions lost; the most that one grew is {growth:.1f} MiB",
            wrong(PROCESS) == 0 and growth <= MAX_GROWTH_MIB,
        ),
    ]


FULL = [{"num_messages": 10_000, "seed": seed, "front_ends": 2 * (seed % 2)} for seed in range(1, 11)]
PART = Part(
    "messages",
    run,
    rows,
    {
        Form.SHORT: [{"num_messages": 1500, "seed": 0, "front_ends": 1}],
        Form.LONG: [{"num_messages": 3000, "seed": 100 + number, "front_ends": number} for number in range(2)],
        Form.FULL: FULL,
    },
)
