"""Both services in this process, over real loopback gRPC: the worker's servicer runs a fake runner.

Ports are chosen by the services; a worker that is started again listens where it did. Waits are bounded by WAIT_S.
"""

import asyncio
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
import numpy as np
import pytest
import xxhash
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tandem_scheduler.core.types import SequenceRequest
from tandem_scheduler.service import SchedulerService
from tandem_shared.config import STEP_TIMEOUT_S, SchedulerSettings
from tandem_shared.rpc.credentials import open_channel
from tandem_shared.rpc.error_interceptor import DETAILS_METADATA_KEY
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tandem_shared.rpc.server import Server
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import WorkerInfo
from tandem_worker.runners.runner import Runner
from tandem_worker.service.servicer import LAST_WORD_GRACE_S, SERVICE_NAME, WorkerServicer
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner, expected_tokens

HOST = "127.0.0.1"
INFERENCE = "tandem.v1.InferenceService"
CONTROL = "tandem.v1.ControlService"
WAIT_S = 30.0
POLL_INTERVAL_S = 0.005

MODEL = "embedded"
VOCAB_SIZE = 1024
"""The vocabulary size of the embedded model's tokenizer."""


def model_info(**changes: object) -> WorkerInfo:
    """A fake worker's info, whose vocabulary is that of the embedded model's tokenizer."""
    return worker_info(**{"model": MODEL, "vocab_size": VOCAB_SIZE, **changes})


class Services:
    """A worker service and a scheduler service. `async with` starts both and stops what still runs."""

    def __init__(
        self,
        runner: Runner | None = None,
        *,
        worker_step_timeout_s: float = STEP_TIMEOUT_S,
        credentials: grpc.ChannelCredentials | None = None,
        **settings: Any,
    ) -> None:
        """credentials: those of this object's own calls, to a scheduler whose certificate is for localhost. settings:
        fields of SchedulerSettings.
        """
        self._credentials = credentials
        self._worker_step_timeout_s = worker_step_timeout_s
        self.runner = runner or FakeRunner(model_info())
        self._settings = settings
        self._worker: Server | None = None
        self._worker_port = 0
        self._supervisor: asyncio.Task[None] | None = None
        self.num_failures = 0

    async def start_worker(self, runner: Runner | None = None) -> None:
        self.runner = runner or self.runner
        servicer = WorkerServicer(self.runner, step_timeout_s=self._worker_step_timeout_s)
        self._worker = Server({SERVICE_NAME: servicer.add_to})
        self._worker_port = await self._worker.start(HOST, self._worker_port)
        self._supervisor = asyncio.create_task(self._restart_after_failure(servicer))

    async def _restart_after_failure(self, servicer: WorkerServicer) -> None:
        """Does what a worker's process and its supervisor do: send the reason, end, start again."""
        assert self._worker is not None
        await servicer.run_until_failure()
        self.num_failures += 1
        await self._worker.stop(2 * LAST_WORD_GRACE_S)
        await self.start_worker()

    async def stop_worker(self) -> None:
        """Stops the worker at once, as if it died."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._worker is not None:
            await self._worker.stop(0)
            self._worker = None

    async def start(self, *, has_worker: bool = True) -> None:
        """has_worker: start a worker and wait for it. Without one the scheduler knows an address at which nothing
        listens.
        """
        await self.start_worker()
        if not has_worker:
            await self.stop_worker()
        settings: dict[str, Any] = {
            "model": MODEL,
            "port": 0,
            "api_server_count": 0,
            "worker_address": f"{HOST}:{self._worker_port}",
        }
        self.service = SchedulerService(SchedulerSettings(**settings | self._settings))
        self.address = f"{HOST}:{await self.service.start()}"
        self.channel = open_channel(
            self.address, self._credentials, [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", "localhost")]
        )
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.control = control_pb2_grpc.ControlServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        if has_worker:
            await self.wait_health("SERVING")

    async def __aenter__(self) -> "Services":
        await self.start()
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    async def stop(self) -> None:
        await self.channel.close()
        await self.service.stop(0)
        await self.stop_worker()

    @property
    def worker_address(self) -> str:
        return f"{HOST}:{self._worker_port}"

    async def drain(self) -> None:
        await self.control.Drain(control_pb2.DrainRequest())

    async def health_of(self, service: str) -> str:
        response = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    async def wait_health(self, status: str) -> None:
        async def has_status() -> bool:
            return await self.health_of(INFERENCE) == status

        await wait_until(has_status, f"health {status}")

    async def load(self) -> control_pb2.GetLoadResponse:
        response: control_pb2.GetLoadResponse = await self.control.GetLoad(control_pb2.GetLoadRequest())
        return response

    async def wait_load(self, is_so: Callable[[control_pb2.GetLoadResponse], bool], what: str) -> None:
        async def check() -> bool:
            return is_so(await self.load())

        await wait_until(check, what)

    async def generate(self, request: inference_pb2.GenerateStreamRequest) -> inference_pb2.GenerateResponse:
        """The same request as a unary call."""
        unary = inference_pb2.GenerateRequest.FromString(request.SerializeToString())
        response: inference_pb2.GenerateResponse = await self.inference.Generate(unary)
        return response

    async def stream(self, request: inference_pb2.GenerateStreamRequest) -> "StreamedOutput":
        return await read_stream(self.inference.GenerateStream(request))


async def wait_until(is_done: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not await is_done():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(POLL_INTERVAL_S)


@dataclass
class StreamedChoice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[inference_pb2.TokenLogprob] = field(default_factory=list)
    finish: inference_pb2.Finish | None = None


@dataclass
class StreamedOutput:
    """A stream's messages and, for each choice, what they add up to."""

    messages: list[inference_pb2.GenerateStreamResponse] = field(default_factory=list)
    choices: dict[int, StreamedChoice] = field(default_factory=dict)
    prompt_logprobs: list[inference_pb2.TokenLogprob] = field(default_factory=list)

    def add(self, message: inference_pb2.GenerateStreamResponse) -> None:
        self.messages.append(message)
        choice = self.choices.setdefault(message.choice_index, StreamedChoice())
        assert choice.finish is None, "news after a choice's end"
        choice.text += message.text_delta
        choice.token_ids += message.token_ids
        choice.logprobs += message.logprobs
        assert not (message.prompt_logprobs and choice.token_ids), "reports of the prompt after the first token"
        self.prompt_logprobs += message.prompt_logprobs
        if message.HasField("finish"):
            choice.finish = message.finish

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids if self.choices else []

    @property
    def usage(self) -> inference_pb2.Usage:
        assert [m.HasField("usage") for m in self.messages] == [False] * (len(self.messages) - 1) + [True]
        return self.messages[-1].usage


async def read_stream(
    call: AsyncIterable[inference_pb2.GenerateStreamResponse], output: StreamedOutput | None = None
) -> StreamedOutput:
    """Reads a stream to its end. Through `output` another task can see what has come so far."""
    output = output or StreamedOutput()
    async for message in call:
        output.add(message)
    return output


def stream_request(
    prompt: str | Iterable[int] = (1, 2, 3),
    max_tokens: int | None = 8,
    *,
    temperature: float | None = 0.0,
    seed: int | None = None,
    request_id: str | None = None,
    **fields: Any,
) -> inference_pb2.GenerateStreamRequest:
    """A greedy request that goes on past end-of-sequence tokens. fields are the message's, or those of its parts."""
    request = inference_pb2.GenerateStreamRequest(request_id=request_id)
    if isinstance(prompt, str):
        request.prompt.text = prompt
    else:
        request.prompt.token_ids.ids.extend(prompt)
    parts = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens, "ignore_eos": True, **fields}
    for name, value in parts.items():
        if value is not None:
            set_field(request, name, value)
    return request


def set_field(request: inference_pb2.GenerateStreamRequest, name: str, value: Any) -> None:
    holders: list[Message] = [request, request.sampling, request.stopping, request.output]
    holder = next(part for part in holders if name in part.DESCRIPTOR.fields_by_name)
    if isinstance(value, list):
        getattr(holder, name).extend(value)
    elif isinstance(value, dict):
        getattr(holder, name).update(value)
    else:
        setattr(holder, name, value)


def true_tokens(
    request: inference_pb2.GenerateStreamRequest,
    prompt_ids: Iterable[int] | None = None,
    choice_index: int = 0,
    stop_token_ids: Iterable[int] = (),
) -> list[int]:
    """The fake model's output for a request, computed alone. The seed is the request's, or the hash of its id."""
    sampling = request.sampling
    seed = sampling.seed if sampling.HasField("seed") else xxhash.xxh64_intdigest(request.request_id.encode())
    sequence = SequenceRequest(
        sequence_id=0,
        prompt_token_ids=np.array(list(prompt_ids or request.prompt.token_ids.ids), np.int32),
        max_tokens=request.stopping.max_tokens,
        sampling=RowSampling(temperature=sampling.temperature, seed=seed, choice_index=choice_index),
        stop_token_ids=frozenset(stop_token_ids),
    )
    return expected_tokens(sequence, vocab_size=VOCAB_SIZE)


def details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The google.rpc.Status that came with an error."""
    return status_pb2.Status.FromString(error.trailing_metadata()[DETAILS_METADATA_KEY])


def violations(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """The violations in an error's BadRequest: field -> description."""
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in details(error).details), details(error)
    return {violation.field: violation.description for violation in bad_request.field_violations}


def retry_delay_s(error: grpc.aio.AioRpcError) -> float:
    """The delay in an error's RetryInfo, in seconds."""
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in details(error).details), details(error)
    return float(retry.retry_delay.ToMilliseconds() / 1000)


async def error_of(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value
