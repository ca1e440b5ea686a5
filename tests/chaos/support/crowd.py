"""Clients in a process of their own, so that their work does not delay the event loop that is measured.

`python -m tests.chaos.support.crowd` reads a Crowd as JSON on standard input and makes its calls. On standard output it
writes one line when it begins and one line of JSON when all calls have ended: how each ended, and when its tokens came.
Times are time.monotonic(), which is one clock for all processes of a host. Each answer is compared with the tokens that
the fake worker's rules give for its prompt.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc

from tandem.v1 import inference_pb2_grpc
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tandem_shared.rpc.rich_status import error_of
from tests.e2e.services import REPOSITORY, generate_request
from tests.support.builders import create_request
from tests.support.fake_worker import expected_tokens

MODULE = "tests.chaos.support.crowd"
VOCAB_SIZE = 1024
"""The vocabulary size of the embedded model's tokenizer."""
RADIX = 1000
"""A call's number, written in this base, is the first two tokens of its prompt, by which the worker knows the call."""
NO_DEADLINE_S = 600.0
STALLED_OPTIONS = [("grpc.http2.lookahead_bytes", 64), ("grpc.http2.bdp_probe", 0)]
"""Options of the stalled calls' connection: gRPC reads almost nothing ahead, so unread messages stay in the server."""


@dataclass(frozen=True)
class Crowd:
    """Open-loop calls: they begin at random times, rate_per_s on average, whether or not earlier ones have ended. With
    a rate of 0 all begin at once.

    deadlines_s: the deadlines that calls take in turn. The first num_stalled calls are not read until all others have
    ended; num_choices and num_logprobs are for the stalled calls alone.
    """

    address: str
    num_calls: int
    num_tokens: int
    rate_per_s: float = 0.0
    prompt_length: int = 4
    deadlines_s: tuple[float, ...] = (NO_DEADLINE_S,)
    num_connections: int = 8
    num_stalled: int = 0
    num_choices: int = 1
    num_logprobs: int = 0
    first_number: int = 0
    seed: int = 0


@dataclass
class Call:
    """How one call ended, and what came of it."""

    number: int
    began: float
    deadline: float
    code: str = ""
    error: str = ""
    says_when_to_retry: bool = False
    is_right: bool = True
    num_tokens: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """For each message with tokens: when it came, and how many tokens it had."""


class CrowdProcess:
    """The clients' process, as the harness sees it. A context manager."""

    def __init__(self, crowd: Crowd) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", MODULE], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(dataclasses.asdict(crowd)) + "\n")
        self.process.stdin.flush()
        self._crowd = crowd

    def __enter__(self) -> "CrowdProcess":
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "begins\n", "the clients did not begin"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def calls(self) -> list[Call]:
        """Waits until all calls have ended, and returns them."""
        assert self.process.stdout is not None
        return [Call(**call) for call in json.loads(self.process.stdout.readline())]


def prompt_of(number: int, length: int) -> list[int]:
    return [number // RADIX, number % RADIX, *range(2, length)]


def number_of(first: int, second: int) -> int:
    return first * RADIX + second


def true_tokens(number: int, length: int, num_tokens: int) -> list[int]:
    request = create_request(0, prompt_of(number, length), num_tokens)
    return expected_tokens(request, vocab_size=VOCAB_SIZE)


class Clients:
    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        # By the call's number: the tokens of its first choice, and the number of all tokens by its usage.
        self._tokens: dict[int, list[int]] = {}
        self._usages: dict[int, int] = {}
        self._others_ended = asyncio.Event()

    async def run(self) -> list[Call]:
        crowd = self._crowd
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        async with contextlib.AsyncExitStack() as stack:
            stubs = []
            for more in [*[[]] * crowd.num_connections, STALLED_OPTIONS]:
                channel = grpc.aio.insecure_channel(crowd.address, [*options, *more])
                stack.push_async_callback(channel.close)
                await channel.channel_ready()
                stubs.append(inference_pb2_grpc.InferenceServiceStub(channel))
            stalled_stub = stubs.pop()
            print("begins", flush=True)
            tasks = []
            due = time.monotonic()
            rng = random.Random(crowd.seed)
            for index in range(crowd.num_calls):
                stub = stalled_stub if index < crowd.num_stalled else stubs[index % len(stubs)]
                tasks.append(asyncio.create_task(self._call(stub, index)))
                if crowd.rate_per_s:
                    due += rng.expovariate(crowd.rate_per_s)
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
            others = await asyncio.gather(*tasks[crowd.num_stalled :])
            self._others_ended.set()
            calls = [*await asyncio.gather(*tasks[: crowd.num_stalled]), *others]
        for call in calls:
            self._check(call)
        return calls

    async def _call(self, stub: inference_pb2_grpc.InferenceServiceStub, index: int) -> Call:
        crowd, number = self._crowd, self._crowd.first_number + index
        request = generate_request(prompt_of(number, crowd.prompt_length), crowd.num_tokens)
        timeout_s = crowd.deadlines_s[index % len(crowd.deadlines_s)]
        is_stalled = index < crowd.num_stalled
        if is_stalled:
            request.num_choices = crowd.num_choices
            request.output.num_logprobs = crowd.num_logprobs
        began = time.monotonic()
        call = Call(number, began, began + timeout_s)
        tokens = self._tokens[number] = []
        try:
            stream = stub.GenerateStream(request, timeout=timeout_s)
            async for message in stream:
                if message.token_ids:
                    call.arrivals.append((time.monotonic(), len(message.token_ids)))
                    call.num_tokens += len(message.token_ids)
                    if message.choice_index == 0:
                        tokens += message.token_ids
                if message.HasField("usage"):
                    self._usages[number] = message.usage.num_output_tokens
                if is_stalled and not self._others_ended.is_set():
                    await self._others_ended.wait()
            call.code = "OK"
        except grpc.aio.AioRpcError as error:
            told = error_of(error)
            call.code, call.error = error.code().name, "" if told is error else f"{type(told).__name__}: {told}"
            call.says_when_to_retry = getattr(told, "retry_after_s", 0) > 0
        return call

    def _check(self, call: Call) -> None:
        """Sets is_right: a call that ended OK must have its whole answer, any other a beginning of it."""
        tokens = self._tokens[call.number]
        truth = true_tokens(call.number, self._crowd.prompt_length, len(tokens)) if tokens else []
        is_whole = len(tokens) == self._crowd.num_tokens and self._usages.get(call.number) == call.num_tokens
        call.is_right = tokens == truth and (is_whole or call.code != "OK")


def ends_of(calls: list[Call]) -> dict[str, int]:
    """The number of calls by status code and class of Tandem's error."""
    return dict(Counter(f"{call.code} {call.error.partition(':')[0]}".strip() for call in calls))


def read_crowd(text: str) -> Crowd:
    fields: dict[str, Any] = json.loads(text)
    return Crowd(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


if __name__ == "__main__":
    print(json.dumps([vars(call) for call in asyncio.run(Clients(read_crowd(sys.stdin.readline())).run())]))
