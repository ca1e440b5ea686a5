"""The ranks of a tensor-parallel worker: how they meet, how rank 0's plans reach the others, how they end together.

Ranks meet through torch.distributed's rendezvous: `tandem-worker --tp-size N` starts the others itself, on this host;
under torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...) each process finds itself to be one, on any host. Beside the
collectives each rank has a connection to rank 0 for plans, which are the bytes of the wire's message. Both ends say
every HEARTBEAT_S that they are alive, and ranks say how many messages they have carried out; who is silent, or does
not get on, is taken as lost, and with one rank the whole group ends: its processes exit, and the scheduler goes on
with the next worker.
"""

import contextlib
import logging
import os
import queue
import secrets
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
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from shared.config import WorkerSettings
from shared.errors import ConfigError, InvalidPlan
from shared.process import die_with_parent
from shared.settings import ENVIRONMENT_PREFIX, to_arguments
from shared.step_codec import decode_plan, encode_plan
from shared.step_plan import StepPlan, WorkerInfo
from tandem.v1 import worker_pb2
from worker_service.runner import PendingStep, Runner
from worker_service.shard import Shard
from worker_service.startup import device_of

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
SILENCE_LIMIT_S = 10.0
"""A rank that says nothing for so long is lost: stopped, or cut off."""
PROGRESS_LIMIT_S = 30.0
"""So is one that doesn't get on with the message that it has."""
PLAN, RESET, STOP, ALIVE = (bytes([kind]) for kind in range(4))
ADDRESS_KEY, SECRET_KEY = "tandem/plans/address", "tandem/plans/secret"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Rank:
    """What a process is told of its place."""

    shard: Shard
    local_rank: int
    """On its host: which of the GPUs there is its own"""
    store: Store
    children: tuple["subprocess.Popen[bytes]", ...] = ()
    """The other ranks, where this process has started them"""


def join_group(settings: WorkerSettings) -> Rank:
    """This process's rank, once all have met; starts the others unless something else has started this one.

    Raises ConfigError where this host has no GPU for it.
    """
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        if "TORCHELASTIC_RUN_ID" in environment and sys.platform == "linux":
            # torchrun ends its processes, unless it is killed itself.
            die_with_parent()
        store, number, size = next(rendezvous("env://"))
        rank = Rank(Shard(number, size), int(environment.get("LOCAL_RANK", 0)), store)
    else:
        server = TCPStore(LOOPBACK, 0, settings.tp_size, is_master=True, wait_for_workers=False)
        variables = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(server.port), "WORLD_SIZE": str(settings.tp_size)}
        # Ranks of one host need no name that resolves.
        variables |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        environment.update(variables)
        children = tuple(_start_rank(settings, number, variables) for number in range(1, settings.tp_size))
        rank = Rank(Shard(0, settings.tp_size), 0, server, children)
        for number, child in enumerate(children, 1):
            threading.Thread(target=_watch_child, args=(number, child), daemon=True).start()
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


def _start_rank(settings: WorkerSettings, number: int, variables: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    return subprocess.Popen(
        [sys.executable, "-m", "worker_service", *to_arguments(settings)],
        env={**kept, **variables, "RANK": str(number), "LOCAL_RANK": str(number)},
        # Out of the terminal's reach: rank 0 ends them.
        start_new_session=True,
        preexec_fn=die_with_parent if sys.platform == "linux" else None,
    )


def _watch_child(number: int, child: "subprocess.Popen[bytes]") -> None:
    status = child.wait()
    if status != 0:
        fail(f"rank {number} (process {child.pid}) ended with status {status}")


def fail(problem: str) -> NoReturn:
    """Ends this process at once: a thread of it may wait in a collective for a rank that will never come."""
    logger.critical("the tensor-parallel group is lost: %s", problem)
    logging.shutdown()
    os._exit(1)


class _Channel:
    """One end of a connection: sends from any thread, and notices when the other end falls silent."""

    def __init__(self, connection: Connection, peer: str) -> None:
        self.peer = peer
        self.is_closing = False
        self._connection = connection
        self._sending = threading.Lock()
        self._heard_at = time.monotonic()
        # A plan must not wait until the one before is acknowledged.
        with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: bytes, body: bytes = b"") -> None:
        try:
            with self._sending:
                self._connection.send_bytes(kind + body)
        except OSError as error:
            self._lose(error)

    def receive(self) -> tuple[bytes, bytes]:
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            self._lose(error)
        self._heard_at = time.monotonic()
        return message[:1], message[1:]

    def _lose(self, error: Exception) -> NoReturn:
        if self.is_closing:
            # Of this thread alone.
            sys.exit()
        fail(f"{self.peer} is gone: {error!r}")

    def keep_alive(self, status: Callable[[], bytes]) -> None:
        """Until the process ends, in a thread of its own."""
        while True:
            self.send(ALIVE, status())
            time.sleep(HEARTBEAT_S)
            silent_s = time.monotonic() - self._heard_at
            if silent_s > SILENCE_LIMIT_S:
                fail(f"{self.peer} has been silent for {silent_s:.0f} s")


def _start_thread(target: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


class Leader:
    """Rank 0's connections to all others."""

    def __init__(self, rank: Rank) -> None:
        """Waits until all are connected."""
        host = os.environ.get("MASTER_ADDR", LOOPBACK)
        secret = secrets.token_bytes(32)
        with Listener(("" if host != LOOPBACK else host, 0), backlog=rank.shard.size, authkey=secret) as listener:
            rank.store.set(SECRET_KEY, secret.hex())
            rank.store.set(ADDRESS_KEY, f"{host}:{listener.address[1]}")
            connections: list[Connection] = []
            while len(connections) < rank.shard.size - 1:
                # Whoever else finds the port does not know the secret.
                with contextlib.suppress(AuthenticationError, EOFError, ConnectionError):
                    connections.append(listener.accept())
        self._num_sent = 0
        self._channels = []
        for connection in connections:
            number, process_id = connection.recv_bytes().decode().split()
            channel = _Channel(connection, f"rank {number} (process {process_id})")
            self._channels.append(channel)
            _start_thread(self._listen, channel)
            _start_thread(channel.keep_alive, lambda: b"")

    def send(self, kind: bytes, body: bytes = b"") -> None:
        """To all."""
        self._num_sent += 1
        for channel in self._channels:
            channel.send(kind, body)

    def stop(self, rank: Rank) -> None:
        """Ends the other ranks, and waits for those that this process has started."""
        for channel in self._channels:
            channel.is_closing = True
        self.send(STOP)
        for child in rank.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(SILENCE_LIMIT_S)

    def _listen(self, channel: _Channel) -> None:
        num_done, since = 0, time.monotonic()
        while True:
            _, body = channel.receive()
            now, done = time.monotonic(), int.from_bytes(body, "little")
            if done > num_done or done >= self._num_sent:
                num_done, since = done, now
            elif now - since > PROGRESS_LIMIT_S:
                fail(f"{channel.peer} has not got past message {done} of {self._num_sent} for {now - since:.0f} s")


class LeadingRunner:
    """Rank 0's runner: what it executes, all ranks do."""

    def __init__(self, runner: Runner, leader: Leader) -> None:
        self._runner = runner
        self._leader = leader

    @property
    def info(self) -> WorkerInfo:
        return self._runner.info

    def execute(self, plan: StepPlan) -> PendingStep:
        """InvalidPlan if the batch can't follow the plan: then no rank can, and none has applied it."""
        self._leader.send(PLAN, encode_plan(plan).SerializeToString())
        return self._runner.execute(plan)

    def reset(self) -> None:
        self._leader.send(RESET)
        self._runner.reset()


class Follower:
    """Another rank's connection to rank 0."""

    def __init__(self, rank: Rank) -> None:
        host, _, port = rank.store.get(ADDRESS_KEY).decode().rpartition(":")
        secret = bytes.fromhex(rank.store.get(SECRET_KEY).decode())
        connection = Client((host, int(port)), authkey=secret)
        connection.send_bytes(f"{rank.shard.rank} {os.getpid()}".encode())
        self._channel = _Channel(connection, "rank 0")
        self._num_done = 0
        # What arrives is read at once, so that rank 0's end is noticed while a step runs.
        self._messages: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()
        _start_thread(self._read)
        _start_thread(self._channel.keep_alive, lambda: self._num_done.to_bytes(8, "little"))

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
            self._num_done += 1

    def _read(self) -> None:
        while True:
            kind, body = self._channel.receive()
            self._channel.is_closing = kind == STOP
            if kind != ALIVE:
                self._messages.put((kind, body))
            if kind == STOP:
                return
