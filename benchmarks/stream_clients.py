"""Client processes that open streams at given times and note when each message came.

The clients send and receive bytes, and parse them only when all streams have ended, so that they take little CPU time
from the server that is measured. Times are time.monotonic(), which all processes of a machine share.
"""

import asyncio
import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import grpc
import numpy as np

from benchmarks.common import BenchmarkError, check_usage, open_channel
from benchmarks.latency import Stream
from tandem.v1 import inference_pb2

METHOD = "/tandem.v1.InferenceService/GenerateStream"
LEAD_S = 1.0
"""The time from handing out the requests to the first arrival."""


@dataclass(frozen=True)
class Arrival:
    """An encoded request, the number of tokens that it asks for, and when it is due."""

    request: bytes
    num_tokens: int
    after_s: float
    """Seconds since the common start."""


@dataclass(frozen=True)
class Run:
    """What all clients saw."""

    started: float
    streams: list[Stream]
    max_cpu_share: float
    """The share of one CPU that the busiest client used. Near 1 the clients limit what is measured."""


class StreamClients:
    """Client processes, which live as long as this context manager."""

    def __init__(self, address: str, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client, args=(address, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> "StreamClients":
        for pipe in self._pipes:
            _receive(pipe)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()

    def run(self, arrivals: Sequence[Arrival], poll: Callable[[], None], poll_s: float) -> Run:
        """Shares the arrivals out and waits for the last stream, calling poll every poll_s meanwhile."""
        started = time.monotonic() + LEAD_S
        for index, pipe in enumerate(self._pipes):
            pipe.send((started, arrivals[index :: len(self._pipes)]))
        streams: list[Stream] = []
        shares = []
        waiting = list(self._pipes)
        while waiting:
            for ready in wait(waiting, poll_s):
                assert isinstance(ready, Connection)
                some, share = _receive(ready)
                streams += some
                shares.append(share)
                waiting.remove(ready)
            poll()
        return Run(started, streams, max(shares))


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise BenchmarkError("a client process ended; it says why above") from None


def _client(address: str, pipe: Connection) -> None:
    asyncio.run(_serve(address, pipe))


async def _serve(address: str, pipe: Connection) -> None:
    async with open_channel(address) as channel:
        await channel.channel_ready()
        method: Any = channel.unary_stream(METHOD)
        pipe.send("ready")
        while True:
            started, arrivals = pipe.recv()
            pipe.send(await _run(method, started, arrivals))


async def _run(method: Any, started: float, arrivals: Sequence[Arrival]) -> tuple[list[Stream], float]:
    gc.collect()
    gc.disable()
    cpu = time.process_time()
    received = await asyncio.gather(*(_stream(method, arrival, started + arrival.after_s) for arrival in arrivals))
    cpu_share = (time.process_time() - cpu) / max(1e-9, time.monotonic() - started)
    gc.enable()
    streams = [parse(arrival, started, *seen) for arrival, seen in zip(arrivals, received, strict=True)]
    return streams, cpu_share


async def _stream(method: Any, arrival: Arrival, due: float) -> tuple[float, list[float], list[bytes]]:
    await asyncio.sleep(due - time.monotonic())
    sent = time.monotonic()
    call = method(arrival.request)
    times, messages = [], []
    while (message := await call.read()) is not grpc.aio.EOF:
        times.append(time.monotonic())
        messages.append(message)
    return sent, times, messages


def parse(arrival: Arrival, started: float, sent: float, times: list[float], messages: list[bytes]) -> Stream:
    responses = [inference_pb2.GenerateStreamResponse.FromString(message) for message in messages]
    num_tokens = np.array([len(response.token_ids) for response in responses])
    check_usage(responses[-1].usage, int(num_tokens.sum()), arrival.num_tokens)
    has_tokens = num_tokens > 0
    due = started + arrival.after_s
    return Stream(due, sent, np.array(times)[has_tokens], num_tokens[has_tokens], times[-1])
