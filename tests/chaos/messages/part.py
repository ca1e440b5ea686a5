"""Malformed and hostile messages to both services over gRPC: every answer has a status that its RPC may give
(statuses.py), and no other client notices.

A piece starts a worker and a scheduler. First every RPC of both ports, and of the socket between the scheduler's
processes, is called with hostile messages (calls.py). Meanwhile other streams are compared with their true answers, and
both services are probed for liveness. Then the scheduler is drained and ended, and sessions with the worker follow, in
each of which one message is hostile (hostile_sessions.py). The growth of memory is measured from the end of the
warm-up, the first fifth of the messages.
"""

import contextlib
import signal

import grpc

from tandem.internal.v1 import worker_pb2, worker_pb2_grpc
from tandem_shared.step_codec import decode_info
from tests.chaos.harness.definitions import Form, Found, Part
from tests.chaos.messages.callers import Callers
from tests.chaos.messages.calls import WARM_UP_SHARE, describe, try_calls
from tests.chaos.messages.findings import PROCESS, SESSION, Findings
from tests.chaos.messages.hostile_calls import Case
from tests.chaos.messages.hostile_sessions import RPC as EXECUTE_STEPS
from tests.chaos.messages.hostile_sessions import Script, Sessions, draw_sessions, opening_of
from tests.chaos.messages.rows import rows
from tests.chaos.messages.watch import Watch
from tests.chaos.support.engines import running_engine
from tests.e2e.waiting import WAIT_S


def run(*, num_messages: int, seed: int, front_ends: int) -> Found:
    found = Findings()
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(
            running_engine(
                worker_flags=["--num-blocks", "1025"],
                scheduler_flags=["--api-server-count", str(front_ends), "--vllm-engine-service", "true"],
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
        found_polite = try_calls(engine, worker, opening, num_messages - num_sessions, seed, watches, found)
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
            found.note(SESSION, f"{outcome.fault}: {describe(case, seed, outcome.code, outcome.details)}")
    watch.note_growth(before)
    watch.check_alive()
    return num_right


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
