"""Who may not get in: callers of the worker that do not have the session secret, callers of the scheduler's public port
that act as its front ends, and other users of the machine at the socket where the real front ends attach.

They try while streams run, whose tokens are held against the truth.
"""

import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import psutil

from tandem.internal.v1 import engine_pb2, engine_pb2_grpc, worker_pb2, worker_pb2_grpc
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tandem_shared.rpc.session_secret import SECRET_METADATA_KEY
from tandem_shared.step_codec import PROTOCOL_VERSION
from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.support.engines import running_engine
from tests.chaos.support.load import Load
from tests.e2e.services import Engine

WAIT_S = 30.0
NUM_STREAMS = 4
NUM_TOKENS = 200
OTHER_USER = 65534
CONNECT = """import os, socket, sys
os.setgroups([]), os.setgid(int(sys.argv[1])), os.setuid(int(sys.argv[1]))
socket.socket(socket.AF_UNIX).connect(sys.argv[2])"""
REFUSED = {"worker": "UNAUTHENTICATED", "public port": "UNIMPLEMENTED", "socket": "PermissionError"}
"""The error with which each attempt must end."""

Metadata = tuple[tuple[str, str | bytes], ...]


def wrong_secrets(secret: bytes, rng: random.Random) -> Iterator[Metadata]:
    """Endless metadata without the right secret, most of it very close to the right one."""
    key = SECRET_METADATA_KEY
    while True:
        at, bit = rng.randrange(len(secret)), 1 << rng.randrange(8)
        flipped = secret[:at] + bytes([secret[at] ^ bit]) + secret[at + 1 :]
        for value in (
            b"",
            flipped,
            secret[:at],
            secret[at + 1 :],
            secret + secret[:1],
            secret[::-1],
            rng.randbytes(64),
        ):
            yield ((key, value),)
        yield ()
        yield ((key.removesuffix("-bin"), secret.hex()),)
        yield (("authorization", f"Bearer {secret.hex()}"),)


def try_worker(address: str, secret: bytes, count: int, seed: int) -> Counter[str]:
    """Counts how calls ended; "let in" counts those that got an answer."""
    ends: Counter[str] = Counter()
    secrets = wrong_secrets(secret, random.Random(seed))
    with grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        # The right secret is let in, or refusing the wrong ones would show nothing.
        info = stub.GetWorkerInfo(
            worker_pb2.GetWorkerInfoRequest(), timeout=WAIT_S, metadata=((SECRET_METADATA_KEY, secret),)
        )
        opening = worker_pb2.OpenSession(
            protocol_version=PROTOCOL_VERSION,
            scheduler_id="intruder",
            session_epoch=2**40,
            worker_instance_id=info.worker_instance_id,
            num_live_sequences=1,
        )
        messages = [
            worker_pb2.ExecuteStepsRequest(open=opening),
            worker_pb2.ExecuteStepsRequest(plan=worker_pb2.StepPlan(step_id=1)),
        ]
        for number in range(count):
            metadata = next(secrets)
            try:
                if number % 2:
                    stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=WAIT_S, metadata=metadata)
                else:
                    next(stub.ExecuteSteps(iter(messages), timeout=WAIT_S, metadata=metadata))
                ends["let in"] += 1
            except grpc.RpcError as error:
                ends[error.code().name] += 1
    return ends


def try_public_port(engine: Engine, count: int) -> Counter[str]:
    ends: Counter[str] = Counter()
    stub = engine_pb2_grpc.EngineServiceStub(engine.channel)
    for _ in range(count):
        try:
            next(stub.Attach(iter([engine_pb2.AttachRequest()]), timeout=WAIT_S))
            ends["let in"] += 1
        except grpc.RpcError as error:
            ends[error.code().name] += 1
    return ends


def try_socket(engine: Engine) -> Counter[str]:
    """Connects as another user. Only root can become one; for others nothing is tried."""
    sockets = {
        connection.laddr
        for connection in psutil.Process(engine.scheduler.process.pid).net_connections("unix")
        if str(connection.laddr).endswith("engine.sock")
    }
    ends: Counter[str] = Counter()
    for path in sockets if os.geteuid() == 0 else ():
        command = [sys.executable, "-S", "-c", CONNECT, str(OTHER_USER), path]
        ended = subprocess.run(command, capture_output=True, text=True)
        words = ended.stderr.splitlines()[-1].split(":") if ended.returncode else ["let in"]
        ends[words[0]] += 1
    return ends


def run(seed: int, attempts: int) -> Found:
    with tempfile.TemporaryDirectory(prefix="tandem-chaos-") as folder:
        secret_file = Path(folder, "session-secret")
        flags = ["--session-secret-file", str(secret_file)]
        with (
            running_engine(worker_flags=flags, scheduler_flags=[*flags, "--api-server-count", "1"]) as engine,
            Load(engine.scheduler.address, NUM_STREAMS, num_tokens=NUM_TOKENS) as load,
        ):
            secret = secret_file.read_bytes().strip()
            num_losses = engine.load().num_worker_losses
            load.start()
            ends = {
                "worker": try_worker(engine.worker.address, secret, attempts, seed),
                "public port": try_public_port(engine, attempts // 10),
                "socket": try_socket(engine),
            }
            load.finish()
            num_losses = engine.load().num_worker_losses - num_losses
    return {"ends": {where: dict(counts) for where, counts in ends.items()}, "losses": num_losses, "load": load.found}


def rows(pieces: Sequence[Found]) -> list[Row]:
    ends = {where: Counter[str]() for where in REFUSED}
    for piece in pieces:
        for where, counts in piece["ends"].items():
            ends[where].update(counts)
    loads = [piece["load"] for piece in pieces]
    num_losses = sum(piece["losses"] for piece in pieces)
    num_wrong = sum(load["wrong"] + sum(load["ended"].values()) for load in loads)
    found = "; ".join(
        f"{where}: {', '.join(f'{count} {end}' for end, count in sorted(counts.items())) or 'not tried'}"
        for where, counts in ends.items()
    )
    return [
        Row(
            "Nobody gets in who should not",
            f"{ends['worker'].total()} calls of the worker with wrong secrets, {ends['public port'].total()} of the "
            f"public port as a front end, {ends['socket'].total()} of the front ends' socket as another user, beside "
            f"{sum(load['answers'] for load in loads)} streams",
            f"{found}; {num_losses} sessions disturbed, {num_wrong} streams ended or wrong",
            ends["worker"].total() > 0
            and all(set(counts) <= {REFUSED[where]} for where, counts in ends.items())
            and not (num_losses or num_wrong)
            and all(load["answers"] and not load["faults"] for load in loads),
        )
    ]


PART = Part(
    "intruders",
    run,
    rows,
    {
        Form.SHORT: [{"seed": 1, "attempts": 200}],
        Form.LONG: [{"seed": 2, "attempts": 2000}],
        Form.FULL: [{"seed": 3, "attempts": 10_000}],
    },
)
