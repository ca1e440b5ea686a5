"""Clients of bad manners: slow ones, ones that close early, ones that do not read, and ones that only connect."""

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from tests.chaos.http.exchange import Broken, Connection, Reply, request
from tests.chaos.http.heads import BODY, PATH
from tests.chaos.http.judge import WrongReply, check

BODY_TIMEOUT_S = 2.0
"""The gateway's --http-body-timeout-s."""
WAIT_S = 60.0
SMALL_BYTES = 4096
MANY = {
    "prompt": [1, 2, 3],
    "n": 8,
    "max_tokens": 200,
    "logprobs": 20,
    "seed": 7,
    "temperature": 0.8,
    "ignore_eos": True,
}
"""A request whose answer is some MB, far more than the buffers between gateway and client hold."""


def slow_sender(port: int, source: random.Random) -> None:
    """A byte at a time, within the time that a body may take."""
    with Connection(port, WAIT_S) as connection:
        for byte in request(PATH, BODY):
            connection.send(bytes([byte]))
            time.sleep(source.choice([0.0, 0.0, 0.001]))
        check(connection.read(), {200})


def endless_sender(port: int, source: random.Random) -> None:
    """A body that never ends, though bytes keep coming."""
    head, _, _ = request(PATH, b" " * 100_000).partition(b"\r\n\r\n")
    with Connection(port, WAIT_S) as connection:
        connection.send(head + b"\r\n\r\n")
        deadline = time.monotonic() + 5 * BODY_TIMEOUT_S
        connection.socket.settimeout(0.1)
        while time.monotonic() < deadline:
            connection.send(b" ")
            with contextlib.suppress(TimeoutError, ConnectionError):
                if connection.socket.recv(1, socket.MSG_PEEK):
                    break
        connection.socket.settimeout(WAIT_S)
        check(connection.read(), {408})


def early_closer(port: int, source: random.Random) -> None:
    """Closes at any moment, also with a reset."""
    body = {"prompt": [source.randrange(900)], "max_tokens": 300, "ignore_eos": True, "stream": source.random() < 0.7}
    data = request(PATH, json.dumps(body).encode())
    with Connection(port, WAIT_S) as connection:
        is_whole = source.random() < 0.7
        connection.send(data if is_whole else data[: source.randrange(len(data))])
        if is_whole and body["stream"] and source.random() < 0.5:
            connection.socket.recv(source.choice([1, 100, 1000]))
        if source.random() < 0.5:
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def stalled_reader(port: int, source: random.Random) -> None:
    """Does not read for a while, then reads all, or closes."""
    with Connection(port, WAIT_S) as connection:
        connection.send(request(PATH, json.dumps(MANY).encode()))
        whole = _texts([json.loads(connection.read().body)])
    with Connection(port, WAIT_S, receive_bytes=SMALL_BYTES) as connection:
        connection.send(request(PATH, json.dumps({**MANY, "stream": True}).encode()))
        time.sleep(source.uniform(0.1, 2.0))
        if source.random() < 0.3:
            return
        reply: Reply = connection.read()
        check(reply, {200})
        if _texts(reply.events()) != whole:
            raise WrongReply("a stalled stream has another text than the whole answer")


def idler(port: int, source: random.Random) -> None:
    """Connections that say nothing, or half a head."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(Connection(port, WAIT_S)) for _ in range(100)]
        for connection in connections:
            connection.send(request(PATH, BODY)[: source.choice([0, 10, 40])])
        with Connection(port, WAIT_S) as other:
            other.send(request(PATH, BODY))
            check(other.read(), {200})


def keeper(port: int, source: random.Random) -> None:
    """Many requests on one connection, right ones and wrong ones in turn."""
    with Connection(port, WAIT_S) as connection:
        for number in range(20):
            connection.send(request(PATH, BODY if number % 2 else source.choice([b"{", b"", b"[]"])))
            check(connection.read(), {200} if number % 2 else {400})


def _texts(answers: list[dict[str, Any]]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for answer in answers:
        for choice in answer["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


MANNERS: dict[str, Callable[[int, random.Random], None]] = {
    "slow sender": slow_sender,
    "endless sender": endless_sender,
    "early closer": early_closer,
    "stalled reader": stalled_reader,
    "idle connections": idler,
    "kept connection": keeper,
}


def fault_of(name: str, port: int, source: random.Random) -> str:
    """What was wrong; empty if nothing was."""
    try:
        MANNERS[name](port, source)
    except (WrongReply, Broken, OSError, ValueError) as error:
        return f"{name}: {error!r}"
    return ""
