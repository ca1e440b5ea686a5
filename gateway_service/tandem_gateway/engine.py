"""The scheduler service as the gateway sees it: calls of the gRPC API, whose errors are those of tandem_shared.errors
where the server sent one, and grpc.RpcError otherwise.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.calls import REPLY_LIMIT, build
from tandem.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.host.reloaded import Reloaded
from tandem_shared.rpc.credentials import open_channel, reloaded_credentials
from tandem_shared.rpc.grpc_options import client_options
from tandem_shared.rpc.rich_status import error_of

Metadata = tuple[tuple[str, str], ...]
Fields = dict[str, Any]
"""The fields of a GenerateRequest, and of a GenerateStreamRequest, which are the same."""

T = TypeVar("T")

NUM_CHANNELS = 4
"""The kernel deals out connections, not calls, to the scheduler's front-end processes, of which there are 4 at most by
default."""

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

INFO_TIMEOUT_S = 5.0

TOKENS_KEPT_S = 60.0
"""How long it is remembered which tags are tokens: the scheduler may be started again with another model."""


class Engine:
    """Connections to one scheduler service, used in one event loop."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Connects when first used. Raises ConfigError for a file of a certificate that can't be read."""
        self._address = settings.scheduler_address
        self._credentials = _credentials(settings)
        self._channels: list[grpc.aio.Channel] = []
        self._connect()
        self.reasoning = "think" if settings.reasoning_parser == "qwen3" else settings.reasoning_parser
        self._is_token: dict[str, bool] = {}
        self._forget_tokens_at = 0.0

    def _connect(self) -> None:
        """Makes the channels of the calls from now on. Calls of older ones go on."""
        # Without a pool of its own, equal channels would share one connection.
        options = [*client_options(self._address), ("grpc.use_local_subchannel_pool", 1)]
        credentials = self._credentials.value if self._credentials is not None else None
        channels = [open_channel(self._address, credentials, options) for _ in range(NUM_CHANNELS)]
        # Channels without calls have no connections after a while. They are few: certificates change each day at most.
        self._channels += channels
        self._next_channel = itertools.cycle(channels)

    def _channel(self) -> grpc.aio.Channel:
        if self._credentials is not None and self._credentials.refresh():
            self._connect()
        return next(self._next_channel)

    @property
    def _inference(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self._channel())

    async def close(self) -> None:
        """Ends the calls that are under way."""
        for channel in self._channels:
            await channel.close()

    async def generate(self, fields: Fields, metadata: Metadata) -> inference_pb2.GenerateResponse:
        """The whole output. Cancelling the task cancels the call."""
        request = build(inference_pb2.GenerateRequest, **fields)
        return await _call(self._inference.Generate, request, metadata=(*metadata, *REPLY_LIMIT))

    async def generate_all(
        self, requests: Sequence[Fields], metadata: Metadata
    ) -> list[inference_pb2.GenerateResponse]:
        """The whole outputs of several prompts. Once one fails, or the task is cancelled, none goes on."""
        tasks = [asyncio.ensure_future(self.generate(fields, metadata)) for fields in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def stream(self, requests: Sequence[Fields], metadata: Metadata) -> "OutputStream":
        """The outputs of several prompts, as they are made."""
        messages = [build(inference_pb2.GenerateStreamRequest, **fields) for fields in requests]
        return OutputStream([self._inference.GenerateStream(message, metadata=metadata) for message in messages])

    async def tokenize(self, request: inference_pb2.TokenizeRequest, metadata: Metadata) -> list[int]:
        return list((await _call(self._inference.Tokenize, request, metadata=metadata)).token_ids)

    async def detokenize(self, request: inference_pb2.DetokenizeRequest, metadata: Metadata) -> str:
        response = await _call(self._inference.Detokenize, request, metadata=(*metadata, *REPLY_LIMIT))
        return str(response.text)

    async def model_info(self, metadata: Metadata) -> inference_pb2.GetModelInfoResponse:
        request = inference_pb2.GetModelInfoRequest()
        return await _call(self._inference.GetModelInfo, request, metadata=metadata, timeout=INFO_TIMEOUT_S)

    async def model_name(self, metadata: Metadata) -> str:
        """The served model's name, which an answer has even if its request names no model."""
        return str((await self.model_info(metadata)).model)

    async def tokens_among(self, texts: Sequence[str], metadata: Metadata) -> frozenset[str]:
        """Those of the texts that are one token of the model. The answers are kept for a while."""
        if time.monotonic() > self._forget_tokens_at:
            self._is_token.clear()
            self._forget_tokens_at = time.monotonic() + TOKENS_KEPT_S
        for text in texts:
            if text not in self._is_token:
                request = inference_pb2.TokenizeRequest(text=text, add_special_tokens=False)
                self._is_token[text] = len(await self.tokenize(request, metadata)) == 1
        return frozenset(text for text in texts if self._is_token.get(text))

    async def metrics(self, metadata: Metadata) -> bytes:
        """The scheduler's metrics in Prometheus's text format."""
        request = control_pb2.GetMetricsRequest()
        response = await _call(
            control_pb2_grpc.ControlServiceStub(self._channel()).GetMetrics,
            request,
            metadata=metadata,
            timeout=INFO_TIMEOUT_S,
        )
        return bytes(response.text)

    async def is_ready(self) -> bool:
        """Whether the scheduler would run a request now."""
        request = health_pb2.HealthCheckRequest(service=INFERENCE_SERVICE)
        response = await _call(health_pb2_grpc.HealthStub(self._channel()).Check, request, timeout=INFO_TIMEOUT_S)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


class OutputStream:
    """The streams of several calls as one, whose items are the index of the call and its message."""

    def __init__(self, calls: Sequence[Any]) -> None:
        self._calls = calls
        self._pumps: list[asyncio.Task[None]] = []

    def cancel(self) -> None:
        """Aborts what still runs."""
        for each in (*self._calls, *self._pumps):
            each.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, inference_pb2.GenerateStreamResponse]]:
        if len(self._calls) == 1:
            try:
                async for message in self._calls[0]:
                    yield 0, message
            except grpc.RpcError as error:
                raise error_of(error) from error
            return
        # With a queue this short, a slow reader makes the calls wait, and the server is told so.
        queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue(len(self._calls))
        self._pumps = [asyncio.create_task(_pump(index, call, queue)) for index, call in enumerate(self._calls)]
        num_open = len(self._calls)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item


async def _pump(index: int, call: Any, queue: "asyncio.Queue[tuple[int, Any]]") -> None:
    """Puts a call's messages into the queue, and then None, or the error that ended it."""
    last: Exception | None = None
    try:
        async for message in call:
            await queue.put((index, message))
    except grpc.RpcError as error:
        last = error_of(error)
    await queue.put((index, last))


async def _call(method: Callable[..., Awaitable[T]], request: object, **options: Any) -> T:
    try:
        return await method(request, **options)
    except grpc.RpcError as error:
        raise error_of(error) from error


def _credentials(settings: GatewaySettings) -> Reloaded[grpc.ChannelCredentials] | None:
    if not settings.scheduler_ca:
        return None
    return reloaded_credentials(
        ("--scheduler-ca", settings.scheduler_ca),
        ("--scheduler-tls-key", settings.scheduler_tls_key),
        ("--scheduler-tls-cert", settings.scheduler_tls_cert),
    )
