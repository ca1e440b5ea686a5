"""Hostile calls of every RPC that an engine answers, beside streams that are held against their truth."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
from grpc import StatusCode

from tandem.internal.v1 import worker_pb2
from tandem.v1 import control_pb2, inference_pb2
from tandem_scheduler.processes.engine_side.front_end_pool import MODULE as FRONT_END
from tests.chaos.harness.definitions import Found
from tests.chaos.messages.callers import Callers
from tests.chaos.messages.findings import ANSWER, PROCESS, Findings
from tests.chaos.messages.hostile_bytes import draw
from tests.chaos.messages.hostile_calls import Case, cases_of, draw_cases, right_messages
from tests.chaos.messages.raw_calls import PATH as RAW_PATH
from tests.chaos.messages.raw_calls import call as raw_call
from tests.chaos.messages.raw_calls import raw_calls
from tests.chaos.messages.statuses import ATTACH, TABLE, allowed
from tests.chaos.messages.watch import Watch
from tests.chaos.support.load import Load
from tests.e2e.services import Engine
from tests.e2e.waiting import WAIT_S, wait_until

NUM_CALLERS = 8
WARM_UP_SHARE = 0.2
"""The share of the messages that come before the first measurement of memory."""
HEX_BYTES = 400
NUM_DRAINS_SHARE = 100
NUM_RAW_SHARE = 30
"""One call in so many is a Drain, and one is written by hand, without a gRPC library."""
DRAIN = "/tandem.v1.ControlService/Drain"


class Attempts:
    """Makes hostile calls and notes each answer that its RPC may not give. A context manager."""

    def __init__(self, engine: Engine, worker: Callers, seed: int, found: Findings) -> None:
        self.model = engine.inference.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=WAIT_S)
        self._engine = engine
        self._worker = worker
        self._seed = seed
        self._found = found
        self._scheduler = Callers(engine.scheduler.address)
        self._callers = dict.fromkeys(TABLE, self._scheduler) | {rpc: worker for rpc in TABLE if "WorkerService" in rpc}
        if socket := _engine_socket(engine):
            self._callers[ATTACH] = Callers(f"unix:{socket}")
        else:
            del self._callers[ATTACH]

    def __enter__(self) -> "Attempts":
        return self

    def __exit__(self, *_: object) -> None:
        self._scheduler.close()
        if attached := self._callers.get(ATTACH):
            attached.close()

    @property
    def rpcs(self) -> list[str]:
        """The RPCs that this engine answers; Attach is one of them only where there are front-end processes."""
        return list(self._callers)

    def attempt(self, case: Case) -> None:
        callers = self._callers.get(case.rpc, self._scheduler)
        is_of_both = callers is self._scheduler and not case.rpc.startswith(("/tandem", "/vllm"))
        if is_of_both and sum(map(len, case.payloads)) % 3 == 0:
            callers = self._worker
        may_be = allowed(case.rpc, case.kind, case.payloads[0] if case.payloads else None, self.model)
        code, details = callers.call(case)
        if code is StatusCode.DEADLINE_EXCEEDED and code not in may_be:
            # The machine is busy: with more time the answer is another one.
            code, details = callers.call(case, has_time=True)
        name = case.rpc if case.rpc in TABLE else "unknown method"
        self._found.counts[f"{name} {code.name}"] += 1
        self._found.kinds[case.kind] += 1
        if code not in may_be:
            self._found.note(ANSWER, describe(case, self._seed, code, details))

    def attempt_raw(self, drawn: tuple[Any, bytes]) -> None:
        status = raw_call(self._engine.scheduler.address, *drawn)
        self._found.counts[f"no gRPC call {status}"] += 1
        self._found.kinds["no gRPC call"] += 1
        has_right_headers = not drawn[0]
        if status == "SILENCE" or (has_right_headers and status not in {code.name for code in TABLE[RAW_PATH]}):
            self._found.note(ANSWER, f"{RAW_PATH} by hand answered {status} to {drawn}, seed {self._seed}")


def try_calls(
    engine: Engine,
    worker: Callers,
    opening: worker_pb2.OpenSession,
    count: int,
    seed: int,
    watches: list[Watch],
    found: Findings,
) -> Found:
    """Calls all RPCs beside polite streams, then Drain. Returns what the polite streams found."""
    with Attempts(engine, worker, seed, found) as attempts:
        makers = right_messages(opening, attempts.model.fingerprint)
        num_drains = max(5, count // NUM_DRAINS_SHARE)
        raws = draw(raw_calls, max(5, count // NUM_RAW_SHARE), seed)
        num_cases = count - num_drains - len(raws)
        cases = draw_cases([rpc for rpc in attempts.rpcs if rpc != DRAIN], makers, num_cases, seed)
        drains = draw(cases_of(DRAIN, makers), num_drains, seed)
        with Load(engine.scheduler.address, 4, num_tokens=20) as polite, ThreadPoolExecutor(NUM_CALLERS) as pool:
            polite.start()
            num_warm = int(len(cases) * WARM_UP_SHARE)
            list(pool.map(attempts.attempt, cases[:num_warm]))
            before = [watch.memory() for watch in watches]
            list(pool.map(attempts.attempt, cases[num_warm:]))
            list(pool.map(attempts.attempt_raw, raws))
            polite.finish(WAIT_S)
            for watch, memory in zip(watches, before, strict=True):
                watch.note_growth(memory)
                watch.check_alive()
            found_polite = polite.found
        _check_books(engine, found)
        for case in drains:
            attempts.attempt(case)
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


def _engine_socket(engine: Engine) -> str | None:
    """Where front-end processes reach the engine. None without such processes."""
    for child in psutil.Process(engine.scheduler.process.pid).children():
        words = child.cmdline()
        if FRONT_END in words:
            [setting] = [word for word in words if word.startswith("--engine-socket=")]
            return setting.partition("=")[2]
    return None


def describe(case: Case, seed: int, code: StatusCode, details: str) -> str:
    data = [
        payload[:HEX_BYTES].hex() + (f"... {len(payload)} bytes" if len(payload) > HEX_BYTES else "")
        for payload in case.payloads
    ]
    metadata = f", metadata {str(case.metadata)[:200]}" if case.metadata else ""
    return (
        f"{case.rpc} answered {code.name} ({details[:200]}) to {case.kind!r}{metadata}, seed {seed}: {' | '.join(data)}"
    )
