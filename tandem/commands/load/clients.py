"""Client processes that send requests when they are due and note when each part of an answer came.

They parse answers only when all have come, so that they take little CPU time from a server on the same machine. Times
are time.monotonic(), which all processes of a machine share.
"""

import asyncio
import gc
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait

from tandem.commands.load.target import Connection, Received, RequestFailed, Target
from tandem.commands.load.workload import Ask
from tandem.latency import Stream
from tandem_shared.errors import TandemError

LEAD_S = 0.5
"""The time from handing out the requests to the start of a run."""


@dataclass
class Run:
    """What the clients saw of one run."""

    started: float
    streams: list[Stream] = field(default_factory=list)
    errors: "Counter[str]" = field(default_factory=Counter)
    """The errors of requests that failed, and how often each came."""
    max_cpu_share: float = 0.0
    """The share of one CPU that the busiest client used. Near 1 the clients limit what is measured."""


class LoadClients:
    """Client processes, which live as long as this context manager."""

    def __init__(self, target: Target, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client, args=(target, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> "LoadClients":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()

    def run(self, asks: Sequence[Ask], show: Callable[[], None], max_concurrency: int | None = None) -> Run:
        """Shares the requests out and waits for the last answer. Calls show() at the end of each. Of more requests than
        max_concurrency, each is due no earlier than when one of its client's ended.
        """
        places = len(asks) if max_concurrency is None else min(max_concurrency, len(asks))
        used = self._pipes[:places]
        for pipe in used:
            # Starting a process takes longer than any lead, so each says when it is ready.
            pipe.send("begin")
            _receive(pipe)
        run = Run(time.monotonic() + LEAD_S)
        for index, pipe in enumerate(used):
            pipe.send((run.started, asks[index :: len(used)], len(range(index, places, len(used)))))
        waiting = list(used)
        while waiting:
            for ready in wait(waiting):
                assert isinstance(ready, Pipe)
                part = _receive(ready)
                if part is None:
                    show()
                    continue
                assert isinstance(part, Run)
                run.streams += part.streams
                run.errors += part.errors
                run.max_cpu_share = max(run.max_cpu_share, part.max_cpu_share)
                waiting.remove(ready)
        return run


def _receive(pipe: Pipe) -> object:
    try:
        return pipe.recv()
    except EOFError:
        raise TandemError("a client process ended; it says why above") from None


def _client(target: Target, pipe: Pipe) -> None:
    try:
        asyncio.run(_serve(target, pipe))
    except (KeyboardInterrupt, EOFError):
        # Ctrl-C in a terminal reaches this process too; the command then ends it.
        return


async def _serve(target: Target, pipe: Pipe) -> None:
    async with target.connect() as connection:
        while True:
            pipe.recv()
            pipe.send("ready")
            started, asks, places = pipe.recv()
            pipe.send(await _run(target, connection, started, asks, places, lambda: pipe.send(None)))


async def _run(
    target: Target, connection: Connection, started: float, asks: Sequence[Ask], places: int, show: Callable[[], None]
) -> Run:
    free = asyncio.Semaphore(places)
    requests = [target.encode(ask) for ask in asks]
    gc.collect()
    gc.disable()
    cpu = time.process_time()
    received = await asyncio.gather(
        *(
            _stream(connection, request, started + ask.after_s, free, show)
            for request, ask in zip(requests, asks, strict=True)
        )
    )
    run = Run(started, max_cpu_share=(time.process_time() - cpu) / max(1e-9, time.monotonic() - started))
    gc.enable()
    for due, each in received:
        try:
            if isinstance(each, RequestFailed):
                raise each
            times, counts = target.parse(each)
            if not times:
                raise RequestFailed("an answer had no token")
        except RequestFailed as error:
            run.errors[str(error)] += 1
        else:
            run.streams.append(Stream(due, each.sent, times, counts, each.times[-1]))
    return run


async def _stream(
    connection: Connection, request: bytes, due: float, free: asyncio.Semaphore, show: Callable[[], None]
) -> tuple[float, Received | RequestFailed]:
    """When the request was due, and what came of it."""
    await asyncio.sleep(due - time.monotonic())
    must_wait = free.locked()
    await free.acquire()
    if must_wait:
        due = time.monotonic()
    try:
        return due, await connection.stream(request)
    except RequestFailed as error:
        return due, error
    finally:
        free.release()
        show()
