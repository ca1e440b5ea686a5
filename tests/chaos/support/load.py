"""Clients that send the same requests again and again and compare each answer with the true one, token by token.

The true answer is what the engine gave for the same request when nothing disturbed it.
"""

import asyncio
import itertools
import math
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import grpc

from tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem_shared.errors import RetryLater
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tandem_shared.rpc.rich_status import error_of
from tests.chaos.support.client_thread import ClientThread
from tests.chaos.support.poisoned_worker import POISONS
from tests.e2e.services import generate_request, random_prompt

KINDS = ("greedy", "seeded", "two choices", "log-probabilities", "penalties", "bias and bad words", "grammar", "chat")
LOGPROB_TOLERANCE = 1e-5
"""Log-probabilities are float32 on the wire, and the order of their sums depends on the batch."""
PAUSE_S = 0.1
"""The pause before a request that was refused is sent again."""
MAX_FAULTS = 20


class WrongStream(Exception):
    """A stream that differs from its request's true answer."""


@dataclass
class Answer:
    """What a request's messages add up to, by choice."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    prompt_logprobs: list[float] = field(default_factory=list)
    finishes: dict[int, int] = field(default_factory=dict)
    num_output_tokens: int | None = None

    def add(self, message: inference_pb2.GenerateStreamResponse) -> None:
        choice = message.choice_index
        if choice in self.finishes:
            raise WrongStream(f"news of choice {choice} after its end")
        self.token_ids.setdefault(choice, []).extend(message.token_ids)
        self.logprobs.setdefault(choice, []).extend(each.logprob for each in message.logprobs)
        self.prompt_logprobs += [each.logprob for each in message.prompt_logprobs]
        if message.HasField("finish"):
            self.finishes[choice] = message.finish.reason
        if message.HasField("usage"):
            self.num_output_tokens = message.usage.num_output_tokens

    def check(self, truth: "Answer", *, is_ended: bool) -> None:
        """Raises WrongStream if this is not a beginning of the true answer or, once ended, not the whole of it."""
        for choice, tokens in self.token_ids.items():
            expected = truth.token_ids.get(choice, [])
            if tokens != expected[: len(tokens)]:
                at = next(
                    i for i, (got, right) in enumerate(zip(tokens, [*expected, None], strict=False)) if got != right
                )
                raise WrongStream(
                    f"choice {choice}: from token {at} on {tokens[at : at + 8]}, not {expected[at : at + 8]}"
                )
            _compare(f"choice {choice}: log-probability", self.logprobs[choice], truth.logprobs[choice])
        _compare("log-probability in the prompt", self.prompt_logprobs, truth.prompt_logprobs)
        if is_ended and (self.token_ids, self.finishes) != (truth.token_ids, truth.finishes):
            raise WrongStream(f"ended with {self.lengths} tokens, not {truth.lengths}")
        if is_ended and {c: len(p) for c, p in self.logprobs.items()} != {c: len(p) for c, p in truth.logprobs.items()}:
            raise WrongStream("log-probabilities are missing, or there are too many")
        if is_ended and len(self.prompt_logprobs) != len(truth.prompt_logprobs):
            raise WrongStream(
                f"{len(self.prompt_logprobs)} log-probabilities of the prompt, not {len(truth.prompt_logprobs)}"
            )
        if is_ended and self.num_output_tokens != truth.num_output_tokens:
            raise WrongStream(f"usage says {self.num_output_tokens} tokens, not {truth.num_output_tokens}")

    @property
    def lengths(self) -> dict[int, int]:
        return {choice: len(tokens) for choice, tokens in self.token_ids.items()}


def _compare(what: str, got: list[float], truth: list[float]) -> None:
    """Compares log-probabilities with the beginning of the true ones."""
    for at, (each, right) in enumerate(zip(got, truth, strict=False)):
        if abs(each - right) > LOGPROB_TOLERANCE:
            raise WrongStream(f"{what} {each} of token {at}, not {right}")


def make_request(number: int, num_tokens: int) -> inference_pb2.GenerateStreamRequest:
    """The request of one client. Lengths differ, the kinds take turns, and no prompt has a poisonous token."""
    kind = KINDS[number % len(KINDS)]
    request = generate_request(
        random_prompt(5 + 7 * (number % 40), min(POISONS), seed=number),
        num_tokens + 5 * (number % 40),
        temperature=0.8 if kind in ("seeded", "two choices", "penalties") else 0.0,
        seed=number,
    )
    if kind == "two choices":
        request.num_choices = 2
    if kind == "log-probabilities":
        request.output.num_logprobs = 3
        request.output.num_prompt_logprobs = 2
        request.output.logprob_token_ids.append(5)
    if kind == "penalties":
        request.sampling.presence_penalty = 0.5
        request.sampling.frequency_penalty = 0.25
        request.sampling.repetition_penalty = 1.2
    if kind == "bias and bad words":
        request.sampling.logit_bias[number % 500] = 3.0
        request.sampling.bad_words.extend(["the", "and"])
    if kind == "chat":
        said = [("system", f"You are ROMEO, number {number}."), ("user", "What hour is it? " * (number % 40 + 1))]
        chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role=role, content=text) for role, text in said])
        request.prompt.CopyFrom(inference_pb2.Prompt(chat=chat))
    if kind == "grammar":
        # As end-of-sequence tokens are ignored, it has no end either.
        request.structured_output.regex = "([a-z]+ )*"
    return request


@dataclass(frozen=True)
class Ending:
    """A call that ended otherwise than with its answer, and whose request is sent again."""

    number: int
    """The client's number."""
    connection: int
    code: str
    details: str
    began_at: float
    num_tokens: int
    retry_after_s: float | None
    """The wait that the server advised."""


class Load(ClientThread):
    """Clients in an event loop and a thread of their own. A context manager, which learns the true answers on entry."""

    def __init__(
        self,
        address: str,
        num_streams: int,
        *,
        num_tokens: int,
        num_connections: int = 1,
        may_end: Collection[grpc.StatusCode] = (),
        timeout_s: float = 600.0,
    ) -> None:
        """num_connections: the connections that the streams share. may_end: status codes that a stream may end with;
        its request is then sent again, with the same id, until it has its answer. timeout_s: the deadline of each call.
        """
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        """The number of calls that ended with an error, by status code, those of may_end included."""
        self.faults: list[str] = []
        """Descriptions of what was wrong, the first MAX_FAULTS of them."""
        self.arrivals: list[float] = []
        """When (time.monotonic()) messages with tokens came, of all streams."""
        self.longest_gap_s = 0.0
        """The longest time between two messages with tokens of one stream."""
        self.heard_at = [0.0] * num_streams
        self.num_ends = [0] * num_streams
        """For each stream: when its last message with tokens came, and how often it ended with an error."""
        self.endings: list[Ending] = []
        """Calls that ended with a code of may_end. The reader of this list clears it."""
        self.open_since: dict[int, float] = {}
        """When (time.monotonic()) each client's open call began."""
        self.answers_of: Counter[int] = Counter()
        """The number of whole answers, by client."""
        self._address = address
        self.num_connections = num_connections
        self._requests = [make_request(number, num_tokens) for number in range(num_streams)]
        self._truth: list[Answer] = []
        self._may_end = set(may_end)
        self._timeout_s = timeout_s
        self._serial = itertools.count()

    def __enter__(self) -> "Load":
        self._thread.start()
        self._run(self._open())
        self._truth = self._run(self._learn())
        return self

    def start(self) -> None:
        self._start(range(len(self._requests)))

    @property
    def found(self) -> dict[str, Any]:
        """What the load found, in the form that a results file keeps."""
        return {
            "streams": len(self._requests),
            "answers": self.counts["answers"],
            "tokens": self.counts["tokens"],
            "longest_gap_s": round(self.longest_gap_s, 3),
            "ended": dict(self.ends),
            "wrong": self.counts["wrong"],
            "faults": self.faults,
        }

    async def _open(self) -> None:
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(self._address, options) for _ in range(self.num_connections)]
        self._stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]

    async def _learn(self) -> list[Answer]:
        truth = [Answer() for _ in self._requests]
        await asyncio.gather(
            *(self._ask(number, request, truth[number], None) for number, request in enumerate(self._requests))
        )
        for request, answer in zip(self._requests, truth, strict=True):
            lengths = dict.fromkeys(range(request.num_choices or 1), request.stopping.max_tokens)
            assert answer.lengths == lengths, f"undisturbed, a request had {answer.lengths} tokens, not {lengths}"
        return truth

    async def _close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _ask(
        self, number: int, request: inference_pb2.GenerateStreamRequest, answer: Answer, truth: Answer | None
    ) -> None:
        """Fills the answer, and compares it with the true one if that is given."""
        before = math.inf
        stub = self._stubs[number % self.num_connections]
        async for message in stub.GenerateStream(request, timeout=self._timeout_s):
            answer.add(message)
            if truth is not None:
                if message.token_ids:
                    now = self.heard_at[number] = time.monotonic()
                    self.arrivals.append(now)
                    self.longest_gap_s = max(self.longest_gap_s, now - before)
                    before = now
                    self.counts["tokens"] += len(message.token_ids)
                answer.check(truth, is_ended=False)
        if truth is not None:
            answer.check(truth, is_ended=True)

    async def _run_client(self, number: int) -> None:
        while not self._is_last:
            request = inference_pb2.GenerateStreamRequest()
            request.CopyFrom(self._requests[number])
            request.request_id = f"load-{number}-{next(self._serial)}"
            while not await self._try_once(number, request):
                await asyncio.sleep(PAUSE_S)

    async def _try_once(self, number: int, request: inference_pb2.GenerateStreamRequest) -> bool:
        """Sends the request. Returns False if it must be sent again."""
        answer = Answer()
        began_at = self.open_since[number] = time.monotonic()
        try:
            await self._ask(number, request, answer, self._truth[number])
        except grpc.aio.AioRpcError as error:
            self.ends[error.code().name] += 1
            self.num_ends[number] += 1
            if error.code() in self._may_end:
                self.endings.append(self._ending(number, error, began_at, answer))
                return False
            self._note(f"{request.request_id} ended {error.code().name}: {error.details()}")
        except WrongStream as error:
            self.counts["wrong"] += 1
            self._note(f"{request.request_id}: {error}")
        else:
            self.counts["answers"] += 1
            self.answers_of[number] += 1
        finally:
            del self.open_since[number]
        return True

    def _ending(self, number: int, error: grpc.aio.AioRpcError, began_at: float, answer: Answer) -> Ending:
        told = error_of(error)
        return Ending(
            number,
            number % self.num_connections,
            error.code().name,
            error.details() or "",
            began_at,
            sum(map(len, answer.token_ids.values())),
            told.retry_after_s if isinstance(told, RetryLater) else None,
        )

    def _note(self, fault: str) -> None:
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(fault)
