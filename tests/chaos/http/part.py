"""Hostile HTTP: bodies, heads and manners that no proper client has, to a real gateway over real connections.

Whatever comes is answered with a status of the table in docs/http.md and an error in OpenAI's form, and 500 is the
answer to no input. Meanwhile well-behaved clients of the same gateway have their true answers. At the end the gateway
has no connection, the scheduler no sequence, neither has grown, and the gateway's log has no traceback. The growth of
memory is measured from the end of the warm-up, the first fifth of the requests.
"""

import contextlib
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.gateways.load import HttpLoad
from tests.chaos.harness.definitions import Form, Found, Part
from tests.chaos.http import manners
from tests.chaos.http.bodies import Case, draw_bodies
from tests.chaos.http.exchange import Broken, Connection, request
from tests.chaos.http.heads import Head, draw_heads
from tests.chaos.http.judge import OF_BODIES, WrongReply, check
from tests.chaos.http.rows import rows
from tests.chaos.kills.part import left_in
from tests.chaos.messages.findings import ANSWER, OTHERS, PROCESS, Findings
from tests.chaos.support.engines import running_engine, tokenizer_folder
from tests.chaos.support.memory import MIB
from tests.e2e.gateway import GatewayProcess
from tests.e2e.services import Engine
from tests.e2e.waiting import wait_until

NUM_CALLERS = 8
WARM_UP_SHARE = 0.2
SILENCE_S = 1.0
"""How long a head that may be silent is waited for."""
SHOWN_BYTES = 300
NUM_POLITE = 10


class Attempts:
    """Hostile requests to one gateway."""

    def __init__(self, port: int, seed: int, found: Findings) -> None:
        self._port = port
        self._seed = seed
        self._found = found

    def body(self, case: Case) -> None:
        path, body = case
        self._attempt(path, request(path, body, headers=((b"connection", b"close"),)), OF_BODIES)

    def head(self, head: Head) -> None:
        self._attempt(
            head.name, head.data, head.allowed, head.num_replies, head.method, may_be_silent=head.may_be_silent
        )

    def manners(self, asked: tuple[str, int]) -> None:
        name, number = asked
        self._found.kinds[name] += 1
        if fault := manners.fault_of(name, self._port, random.Random(f"{self._seed} {number}")):
            self._found.note(ANSWER, fault)

    def _attempt(
        self,
        name: str,
        data: bytes,
        allowed: frozenset[int],
        num_replies: int = 1,
        method: str = "POST",
        *,
        may_be_silent: bool = False,
    ) -> None:
        self._found.kinds[name] += 1
        try:
            with Connection(self._port, SILENCE_S if may_be_silent else manners.WAIT_S) as connection:
                connection.send(data)
                for _ in range(num_replies):
                    reply = connection.read(method)
                    self._found.counts[str(reply.status)] += 1
                    check(reply, allowed, method=method)
        except Broken as error:
            self._found.counts["no reply"] += 1
            if not may_be_silent:
                self._note(name, data, error)
        except (WrongReply, OSError, ValueError) as error:
            self._note(name, data, error)

    def _note(self, name: str, data: bytes, error: Exception) -> None:
        shown = f"{data[:SHOWN_BYTES]!r}" + (f" of {len(data)} bytes" if len(data) > SHOWN_BYTES else "")
        self._found.note(ANSWER, f"{name}: {error!r} to {shown}, seed {self._seed}")


def run(*, seed: int, num_bodies: int, num_heads: int, num_manners: int, front_ends: int, http_workers: int) -> Found:
    found = Findings()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-chaos-")))
        flags = ["--api-server-count", str(front_ends), "--tokenizer", str(tokenizer_folder(folder))]
        engine = stack.enter_context(running_engine(scheduler_flags=flags))
        gateway_flags = ["--http-workers", str(http_workers), "--http-body-timeout-s", str(manners.BODY_TIMEOUT_S)]
        gateway_flags += ["--http-max-body-bytes", str(2 * MIB)]
        gateway = GatewayProcess(engine.scheduler.address, folder, *gateway_flags)
        stack.callback(gateway.kill)
        books = Books(engine, gateway)
        with HttpLoad(gateway.url, NUM_POLITE, num_tokens=20) as polite:
            polite.start()
            _try_all(Attempts(gateway.port, seed, found), books, found, num_bodies, num_heads, num_manners, seed)
            polite.finish()
        for ending in polite.endings:
            found.note(OTHERS, f"a well-behaved client: {ending}")
        for fault in polite.faults:
            found.note(OTHERS, fault)
        books.check_left(found)
        if (status := gateway.stop()) != 0:
            found.note(PROCESS, f"the gateway's exit status is {status}")
        _check_log(gateway.log_file.read_text(errors="replace"), found)
    return {
        "requests": sum(found.kinds.values()),
        "answers": dict(sorted(found.counts.items())),
        "kinds": len(found.kinds),
        "manners": {name: found.kinds[name] for name in manners.MANNERS},
        "wrong": dict(found.wrong),
        "faults": found.faults,
        "growth_mib": found.growth_mib,
        "polite": polite.found,
        "http_workers": http_workers,
    }


def _try_all(
    attempts: Attempts, books: "Books", found: Findings, num_bodies: int, num_heads: int, num_manners: int, seed: int
) -> None:
    names = list(manners.MANNERS)
    works: list[tuple[Callable[[Any], None], Any]] = [(attempts.body, case) for case in draw_bodies(num_bodies, seed)]
    works += [(attempts.head, head) for head in draw_heads(num_heads, seed)]
    works += [(attempts.manners, (names[number % len(names)], number)) for number in range(num_manners)]
    random.Random(seed).shuffle(works)
    num_warm = int(len(works) * WARM_UP_SHARE)
    with ThreadPoolExecutor(NUM_CALLERS) as pool:
        list(pool.map(lambda work: work[0](work[1]), works[:num_warm]))
        before = books.memory()
        list(pool.map(lambda work: work[0](work[1]), works[num_warm:]))
    for name, now in books.memory().items():
        found.growth_mib[name] = round((now - before.get(name, 0)) / MIB, 1)


class Books:
    """What gateway and scheduler hold."""

    def __init__(self, engine: Engine, gateway: GatewayProcess) -> None:
        self._engine = engine
        self._port = gateway.port
        self._processes = {
            f"{name} {number}": process
            for name, pid in (("gateway", gateway.process.pid), ("scheduler", engine.scheduler.process.pid))
            for number, process in enumerate(_all_of(pid))
        }

    def memory(self) -> dict[str, int]:
        return {name: process.memory_info().rss for name, process in self._processes.items() if process.is_running()}

    def check_left(self, found: Findings) -> None:
        """Notes what is still there of requests that have all ended, and processes that are not."""

        def left() -> dict[str, int]:
            books = {**left_in(self._engine.load()), "connections": self._num_connections()}
            return {what: count for what, count in books.items() if count}

        with contextlib.suppress(AssertionError):
            wait_until(lambda: not left(), "", 20.0)
        if still := left():
            found.note(PROCESS, f"left behind: {still}")
        if losses := self._engine.load().num_worker_losses:
            found.note(PROCESS, f"the scheduler lost its worker {losses} times")
        for name, process in self._processes.items():
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                found.note(PROCESS, f"{name} is gone")

    def _num_connections(self) -> int:
        """The HTTP connections that the gateway's processes still hold."""
        held: Counter[str] = Counter()
        for name, process in self._processes.items():
            if name.startswith("gateway"):
                each = [one for one in process.net_connections("tcp") if one.laddr.port == self._port]
                held[name] = sum(one.status != psutil.CONN_LISTEN for one in each)
        return held.total()


def _all_of(pid: int) -> Sequence[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def _check_log(log: str, found: Findings) -> None:
    for word in ("Traceback", " ERROR ", " CRITICAL "):
        if word in log:
            at = log.index(word)
            found.note(
                PROCESS, f"the gateway's log has {log.count(word)} times {word.strip()}: {log[at : at + 9000][-2500:]}"
            )


PART = Part(
    "http",
    run,
    rows,
    {
        Form.SHORT: [
            {"seed": 0, "num_bodies": 200, "num_heads": 200, "num_manners": 6, "front_ends": 0, "http_workers": 1}
        ],
        Form.LONG: [
            {"seed": 1, "num_bodies": 800, "num_heads": 400, "num_manners": 18, "front_ends": 1, "http_workers": 2}
        ],
        Form.FULL: [
            {
                "seed": 10 + number,
                "num_bodies": 2_500,
                "num_heads": 1_000,
                "num_manners": 60,
                "front_ends": number % 3,
                "http_workers": 1 + number % 2,
            }
            for number in range(24)
        ],
    },
)
