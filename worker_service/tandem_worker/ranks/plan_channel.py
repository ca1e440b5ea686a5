"""How rank 0's plans reach the other ranks: a connection to each, with heartbeats from both ends.

Messages are bytes: a kind and, for a plan, the wire's own message. A rank that falls silent is lost, and the group ends
(group_failure.py). A rank that hangs in a step holds up rank 0's step, which the session of rank 0 notices. A step that
fails on rank 0 ends rank 0, and so the others, which would wait for it.
"""

import contextlib
import os
import queue
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

from tandem.internal.v1 import worker_pb2
from tandem_shared.errors import InvalidPlan
from tandem_shared.step_codec import decode_plan, encode_plan
from tandem_shared.step_plan import StepPlan, WorkerInfo
from tandem_worker.ranks.group_failure import fail
from tandem_worker.ranks.rank_group import LOOPBACK, Rank
from tandem_worker.runners.runner import PendingStep, Runner

HEARTBEAT_S = 1.0
SILENCE_LIMIT_S = 10.0
"""A rank that is silent for longer is lost: it has stopped, or is cut off."""
PLAN, RESET, STOP, ALIVE = (bytes([kind]) for kind in range(4))
"""A message's first byte: what kind of message it is."""
ADDRESS_KEY, SECRET_KEY = "tandem/plans/address", "tandem/plans/secret"
"""Where rank 0 leaves its address and the connections' secret in the rendezvous's store."""


class Channel:
    """One end of a connection between ranks: sends from any thread, and notices when the other end falls silent."""

    def __init__(self, connection: Connection, peer: str) -> None:
        self.peer = peer
        self.is_closing = False
        self._connection = connection
        self._sending = threading.Lock()
        self._heard_at: float | None = None
        # A plan must not wait until the one before it is acknowledged.
        with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: bytes, body: bytes = b"") -> None:
        """Sends a message; waits where the peer does not read. Fails where the peer is gone."""
        try:
            with self._sending:
                self._connection.send_bytes(kind + body)
        except OSError as error:
            if not self.is_closing:
                fail(f"{self.peer} is gone: {error!r}")

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next message, its kind and its body; None at the end of a connection that is closing. Fails where the
        peer is gone.
        """
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            if self.is_closing:
                return None
            fail(f"{self.peer} is gone: {error!r}")
        self._heard_at = time.monotonic()
        return message[:1], message[1:]

    def start(self) -> None:
        """Sends heartbeats from now on, and fails when the other end falls silent."""
        _start_thread(self._keep_alive)
        # A second thread, as sending may wait for the very peer that is frozen.
        _start_thread(self._watch)

    def _keep_alive(self) -> None:
        while not self.is_closing:
            self.send(ALIVE)
            time.sleep(HEARTBEAT_S)

    def _watch(self) -> None:
        while not self.is_closing:
            time.sleep(HEARTBEAT_S)
            # The first message may come late: ranks start at different speeds.
            silent_s = time.monotonic() - self._heard_at if self._heard_at is not None else 0
            if silent_s > SILENCE_LIMIT_S:
                fail(f"{self.peer} has been silent for {silent_s:.0f} s")


def _start_thread(target: Callable[..., None], *arguments: object) -> threading.Thread:
    """Starts a thread that ends with the process, if not before."""
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


class Leader:
    """Rank 0's connections to all other ranks."""

    def __init__(self, rank: Rank) -> None:
        """Waits until all ranks are connected. They find the secret in the rendezvous's store; it keeps out stray
        connections, not someone who can read the store.
        """
        host = os.environ.get("MASTER_ADDR", LOOPBACK) if not rank.children else LOOPBACK
        secret = secrets.token_bytes(32)
        self._children = rank.children
        self._sending = threading.Lock()
        self._is_stopping = False
        self._channels: list[Channel] = []
        self._listeners: list[threading.Thread] = []
        with Listener((LOOPBACK if host == LOOPBACK else "", 0), backlog=rank.shard.size, authkey=secret) as listener:
            rank.store.set(SECRET_KEY, secret.hex())
            rank.store.set(ADDRESS_KEY, f"{host}:{listener.address[1]}")
            while len(self._channels) < rank.shard.size - 1:
                with contextlib.suppress(AuthenticationError, EOFError, OSError):
                    self._add(listener.accept())

    def send(self, kind: bytes, body: bytes = b"") -> None:
        """Sends a message to all ranks, which get all messages in the same order. After STOP it sends nothing."""
        with self._sending:
            if self._is_stopping:
                return
            self._is_stopping = kind == STOP
            for channel in self._channels:
                channel.is_closing = self._is_stopping
                channel.send(kind, body)

    def join(self) -> None:
        """Waits for the other ranks, which have been told to stop, for at most SILENCE_LIMIT_S."""
        deadline = time.monotonic() + SILENCE_LIMIT_S
        for listener in self._listeners:
            listener.join(max(0.0, deadline - time.monotonic()))
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))

    def _add(self, connection: Connection) -> None:
        number, process_id = connection.recv_bytes().decode().split()
        channel = Channel(connection, f"rank {number} (process {process_id})")
        self._channels.append(channel)
        self._listeners.append(_start_thread(self._listen, channel))
        channel.start()

    def _listen(self, channel: Channel) -> None:
        while channel.receive():
            pass


class LeadingRunner:
    """Rank 0's runner: all ranks execute what it executes."""

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
        """Raises InvalidPlan if the batch can't follow the plan: then no rank can, and none has applied it."""
        self._leader.send(PLAN, encode_plan(plan).SerializeToString())
        return self._runner.execute(plan)

    def reset(self) -> None:
        self._leader.send(RESET)
        self._runner.reset()

    def close(self) -> None:
        self._runner.close()


class Follower:
    """Another rank's connection to rank 0. Rank 0 alone says when the rank ends: the process ignores signals."""

    def __init__(self, rank: Rank) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        host, _, port = rank.store.get(ADDRESS_KEY).decode().rpartition(":")
        secret = bytes.fromhex(rank.store.get(SECRET_KEY).decode())
        connection = Client((host, int(port)), authkey=secret)
        connection.send_bytes(f"{rank.shard.rank} {os.getpid()}".encode())
        self._channel = Channel(connection, "rank 0")
        # Messages are read at once, so that the end of rank 0 is noticed while a step runs.
        self._messages: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()
        _start_thread(self._read)
        self._channel.start()

    def run(self, runner: Runner) -> None:
        """Carries out rank 0's messages until STOP."""
        while True:
            kind, body = self._messages.get()
            if kind == STOP:
                return
            elif kind == RESET:
                runner.reset()
            else:
                # Rank 0 refuses the plan too, and reports it.
                with contextlib.suppress(InvalidPlan):
                    runner.execute(decode_plan(worker_pb2.StepPlan.FromString(body)))

    def _read(self) -> None:
        while message := self._channel.receive():
            self._channel.is_closing = message[0] == STOP
            if message[0] != ALIVE:
                self._messages.put(message)
