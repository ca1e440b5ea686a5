"""The ranks of a tensor-parallel worker: how they meet, how rank 0's plans reach the others, how they end together.

Ranks meet through torch.distributed's rendezvous: `tandem-worker --tp-size N` starts the others itself, on this host;
under torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...) each process finds itself to be one, on any host. Beside the
collectives each rank has a connection to rank 0 for plans, which are the bytes of the wire's message. Both ends say
every HEARTBEAT_S that they are alive; who is silent is taken as lost, and with one rank the whole group ends: its
processes exit, and the scheduler goes on with the next worker. A rank that hangs in a step holds up rank 0's step,
whose session notices. A step that fails on rank 0 ends rank 0, and so the others, which would wait for it.
"""

import atexit
import contextlib
import logging
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from tandem.internal.v1 import worker_pb2
from tandem_shared.config import WorkerSettings
from tandem_shared.errors import ConfigError, InvalidPlan
from tandem_shared.host.private_folder import PrivateFolder
from tandem_shared.host.process import child_environment, die_with_parent, end_with_parent
from tandem_shared.settings import to_arguments
from tandem_shared.step_codec import decode_plan, encode_plan
from tandem_shared.step_plan import StepPlan, WorkerInfo
from tandem_worker.device import device_of
from tandem_worker.ranks.shard import Shard
from tandem_worker.runners.runner import PendingStep, Runner

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
SILENCE_LIMIT_S = 10.0
"""A rank that says nothing for so long is lost: stopped, or cut off."""
LAST_WORDS_S = 5.0
"""How long rank 0 takes, at most, to tell the scheduler why it ends."""
LEAVE_LIMIT_S = 15.0
"""That ranks wait for each other at the end."""
PLAN, RESET, STOP, ALIVE = (bytes([kind]) for kind in range(4))
ADDRESS_KEY, SECRET_KEY = "tandem/plans/address", "tandem/plans/secret"
LOOPBACK = "127.0.0.1"
STORE_VARIABLE = "RANK_STORE"
"""Tells a rank that rank 0 has started where to meet."""


@dataclass(frozen=True)
class Rank:
    """What a process is told of its place."""

    shard: Shard
    local_rank: int
    """On its host: which of the GPUs there is its own"""
    store: Store
    children: tuple["subprocess.Popen[bytes]", ...] = ()
    """The other ranks, where this process has started them"""


def join_group(settings: WorkerSettings, parent_pid: int) -> Rank:
    """This process's rank, once all have met; starts the others unless something else has started this one.

    parent_pid is what the process began under. Raises ConfigError where this host has no GPU for it.
    """
    environment = os.environ
    if STORE_VARIABLE in environment:
        store = FileStore(environment[STORE_VARIABLE], settings.tp_size)
        rank = Rank(Shard(int(environment["RANK"]), settings.tp_size), int(environment["LOCAL_RANK"]), store)
    elif "RANK" in environment and "WORLD_SIZE" in environment:
        if "TORCHELASTIC_RUN_ID" in environment and sys.platform == "linux":
            # torchrun ends its processes, unless it is killed itself.
            end_with_parent(parent_pid)
        store, number, size = next(rendezvous("env://"))
        rank = Rank(Shard(number, size), int(environment.get("LOCAL_RANK", 0)), store)
    else:
        rank = _start_group(settings)
    is_on_gpu = device_of(settings).type == "cuda"
    if is_on_gpu:
        if rank.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {rank.shard.rank} needs GPU {rank.local_rank}; torch finds {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(rank.local_rank)
    dist.init_process_group(
        "nccl" if is_on_gpu else "gloo",
        store=PrefixStore("collectives", rank.store),
        rank=rank.shard.rank,
        world_size=rank.shard.size,
    )
    return rank


def leave_group(runner: Runner) -> None:
    """Ends a runner, then the process group, as all ranks do at the same time; fails where one of them does not."""
    limit = threading.Timer(LEAVE_LIMIT_S, fail, ["its ranks did not end together"])
    limit.daemon = True
    limit.start()
    runner.close()
    dist.destroy_process_group()
    limit.cancel()


def _start_group(settings: WorkerSettings) -> Rank:
    """As rank 0 of a group on this host. They meet in a folder that nobody else may read, not on a port."""
    folder = PrivateFolder("tandem-ranks-")
    atexit.register(folder.close)
    variables = {STORE_VARIABLE: f"{folder.path}/store", "WORLD_SIZE": str(settings.tp_size)}
    os.environ["LOCAL_WORLD_SIZE"] = variables["LOCAL_WORLD_SIZE"] = str(settings.tp_size)
    if sys.platform == "linux":
        # Ranks of one host need no name that resolves.
        os.environ["GLOO_SOCKET_IFNAME"] = variables["GLOO_SOCKET_IFNAME"] = "lo"
    children = tuple(_start_rank(settings, number, variables) for number in range(1, settings.tp_size))
    for number, child in enumerate(children, 1):
        _start_thread(_watch_child, number, child)
    return Rank(Shard(0, settings.tp_size), 0, FileStore(variables[STORE_VARIABLE], settings.tp_size), children)


def _start_rank(settings: WorkerSettings, number: int, variables: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "tandem_worker", *to_arguments(settings)],
        env={**child_environment(), **variables, "RANK": str(number), "LOCAL_RANK": str(number)},
        # Out of the terminal's reach: rank 0 ends them.
        start_new_session=True,
        preexec_fn=die_with_parent if sys.platform == "linux" else None,
    )


def _watch_child(number: int, child: "subprocess.Popen[bytes]") -> None:
    status = child.wait()
    if status != 0:
        fail(f"rank {number} (process {child.pid}) ended with status {status}")


_tell: Callable[[str], None] | None = None


def tell_failures(tell: Callable[[str], None]) -> None:
    """Whom rank 0 tells, from any thread, before it ends."""
    global _tell
    _tell = tell


def fail(problem: str) -> NoReturn:
    """Ends this process: a thread of it may wait in a collective for a rank that will never come."""
    reason = f"the tensor-parallel group is lost: {problem}"
    logger.critical("%s", reason)
    if _tell is not None:
        _tell(reason)
        # That ends the process, if it can.
        time.sleep(LAST_WORDS_S)
    logging.shutdown()
    os._exit(1)


class _Channel:
    """One end of a connection: sends from any thread, and notices when the other end falls silent."""

    def __init__(self, connection: Connection, peer: str) -> None:
        self.peer = peer
        self.is_closing = False
        self._connection = connection
        self._sending = threading.Lock()
        self._heard_at: float | None = None
        # A plan must not wait until the one before is acknowledged.
        with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: bytes, body: bytes = b"") -> None:
        """May wait, for a peer that does not read."""
        try:
            with self._sending:
                self._connection.send_bytes(kind + body)
        except OSError as error:
            if not self.is_closing:
                fail(f"{self.peer} is gone: {error!r}")

    def receive(self) -> tuple[bytes, bytes] | None:
        """None at the end of a connection that is closing."""
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            if self.is_closing:
                return None
            fail(f"{self.peer} is gone: {error!r}")
        self._heard_at = time.monotonic()
        return message[:1], message[1:]

    def start(self) -> None:
        """Says from now on that this end is alive, and watches the other: who is silent is lost."""
        _start_thread(self._keep_alive)
        # A thread of its own, as sending may wait for the very peer that is frozen.
        _start_thread(self._watch)

    def _keep_alive(self) -> None:
        while not self.is_closing:
            self.send(ALIVE)
            time.sleep(HEARTBEAT_S)

    def _watch(self) -> None:
        while not self.is_closing:
            time.sleep(HEARTBEAT_S)
            # What is heard first may come late: ranks start at different speeds.
            silent_s = time.monotonic() - self._heard_at if self._heard_at is not None else 0
            if silent_s > SILENCE_LIMIT_S:
                fail(f"{self.peer} has been silent for {silent_s:.0f} s")


def _start_thread(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


class Leader:
    """Rank 0's connections to all others."""

    def __init__(self, rank: Rank) -> None:
        """Waits until all are connected. The secret keeps strays out, not whoever can read the rendezvous's store."""
        host = os.environ.get("MASTER_ADDR", LOOPBACK) if not rank.children else LOOPBACK
        secret = secrets.token_bytes(32)
        self._children = rank.children
        self._sending = threading.Lock()
        self._is_stopping = False
        self._channels: list[_Channel] = []
        self._listeners: list[threading.Thread] = []
        with Listener((LOOPBACK if host == LOOPBACK else "", 0), backlog=rank.shard.size, authkey=secret) as listener:
            rank.store.set(SECRET_KEY, secret.hex())
            rank.store.set(ADDRESS_KEY, f"{host}:{listener.address[1]}")
            while len(self._channels) < rank.shard.size - 1:
                with contextlib.suppress(AuthenticationError, EOFError, OSError):
                    self._add(listener.accept())

    def send(self, kind: bytes, body: bytes = b"") -> None:
        """To all, who get all messages in one order; nothing after the end."""
        with self._sending:
            if self._is_stopping:
                return
            self._is_stopping = kind == STOP
            for channel in self._channels:
                channel.is_closing = self._is_stopping
                channel.send(kind, body)

    def join(self) -> None:
        """Waits for the other ranks, which have been told to stop, but not for ever."""
        deadline = time.monotonic() + SILENCE_LIMIT_S
        for listener in self._listeners:
            listener.join(max(0.0, deadline - time.monotonic()))
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))

    def _add(self, connection: Connection) -> None:
        number, process_id = connection.recv_bytes().decode().split()
        channel = _Channel(connection, f"rank {number} (process {process_id})")
        self._channels.append(channel)
        self._listeners.append(_start_thread(self._listen, channel))
        channel.start()

    def _listen(self, channel: _Channel) -> None:
        while channel.receive():
            pass


class LeadingRunner:
    """Rank 0's runner: what it executes, all ranks do."""

    def __init__(self, runner: Runner, leader: Leader) -> None:
        self._runner = runner
        self._leader = leader

    @property
    def info(self) -> WorkerInfo:
        return self._runner.info

    @property
    def progress(self) -> int:
        return self._runner.progress

    def execute(self, plan: StepPlan) -> PendingStep:
        """InvalidPlan if the batch can't follow the plan: then no rank can, and none has applied it."""
        self._leader.send(PLAN, encode_plan(plan).SerializeToString())
        return self._runner.execute(plan)

    def reset(self) -> None:
        self._leader.send(RESET)
        self._runner.reset()

    def close(self) -> None:
        self._runner.close()


class Follower:
    """Another rank's connection to rank 0, which alone says when the rank ends: it takes no signals."""

    def __init__(self, rank: Rank) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        host, _, port = rank.store.get(ADDRESS_KEY).decode().rpartition(":")
        secret = bytes.fromhex(rank.store.get(SECRET_KEY).decode())
        connection = Client((host, int(port)), authkey=secret)
        connection.send_bytes(f"{rank.shard.rank} {os.getpid()}".encode())
        self._channel = _Channel(connection, "rank 0")
        # What arrives is read at once, so that rank 0's end is noticed while a step runs.
        self._messages: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()
        _start_thread(self._read)
        self._channel.start()

    def run(self, runner: Runner) -> None:
        """Carries out what rank 0 says, until it says that this is the end."""
        while True:
            kind, body = self._messages.get()
            if kind == STOP:
                return
            elif kind == RESET:
                runner.reset()
            else:
                # Rank 0 refuses it too, and says so.
                with contextlib.suppress(InvalidPlan):
                    runner.execute(decode_plan(worker_pb2.StepPlan.FromString(body)))

    def _read(self) -> None:
        while message := self._channel.receive():
            self._channel.is_closing = message[0] == STOP
            if message[0] != ALIVE:
                self._messages.put(message)
