"""A client of a scheduler service for asyncio. It has the methods of TandemClient (tandem/client.py), as coroutines."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

import grpc

from tandem.calls import (
    DEFAULT_MAX_RETRIES,
    REPLY_LIMIT,
    ArrayOfIds,
    Attempts,
    Metadata,
    Prompt,
    build,
    metadata_of,
    request_fields,
    token_ids_of,
)
from tandem.chat import Chat
from tandem.sampling_params import SamplingParams
from tandem.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tandem_shared.rpc.credentials import open_channel
from tandem_shared.rpc.grpc_options import client_options

T = TypeVar("T")


class AsyncTandemClient:
    """One connection to a server, made and used in one event loop. What it raises, and when it repeats a call, is as
    with TandemClient. Cancelling a task that awaits a call cancels the call.
    """

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials | None = None,
        *,
        metadata: Metadata = (),
        max_retries: int = DEFAULT_MAX_RETRIES,
    ) -> None:
        """address is HOST:PORT. With credentials the connection uses TLS. metadata is sent with every call, for example
        (("authorization", "Bearer KEY"),). max_retries is how often a failed call is repeated at most. Connects when
        first used.
        """
        self._channel = open_channel(address, credentials, client_options(address))
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)
        self._metadata = metadata
        self._max_retries = max_retries

    async def __aenter__(self) -> "AsyncTandemClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection. Calls that are under way end with an error."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
        metadata: Metadata = (),
    ) -> inference_pb2.GenerateResponse:
        """Returns the whole output of a prompt. TandemClient.generate says what the arguments mean."""
        request = build(
            inference_pb2.GenerateRequest, **request_fields(prompt, params, request_id, priority, cache_salt)
        )
        metadata = metadata_of(REPLY_LIMIT, metadata)
        return await self._call(self._inference.Generate, request, timeout_s=timeout_s, metadata=metadata)

    async def generate_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
        metadata: Metadata = (),
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse]:
        """Yields the output while it is generated. Closing the generator aborts the request."""
        request = build(
            inference_pb2.GenerateStreamRequest, **request_fields(prompt, params, request_id, priority, cache_salt)
        )
        attempts = Attempts(self._max_retries, timeout_s)
        while True:
            call = self._inference.GenerateStream(
                request, timeout=attempts.time_left_s(), metadata=metadata_of(self._metadata, metadata)
            )
            try:
                async for delta in call:
                    attempts.end()
                    yield delta
                return
            except grpc.RpcError as failure:
                pause_s = attempts.pause_after(failure)
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

    async def tokenize(self, text: str | Chat, *, add_special_tokens: bool | None = None) -> list[int]:
        """The token ids of a text or a conversation. Around a text the tokenizer puts its special tokens, unless
        add_special_tokens is False; a conversation has them from the model's chat template.
        """
        fields = {"chat": text.message} if isinstance(text, Chat) else {"text": text}
        request = build(inference_pb2.TokenizeRequest, **fields, add_special_tokens=add_special_tokens)
        return list((await self._call(self._inference.Tokenize, request)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int] | ArrayOfIds, *, skip_special_tokens: bool | None = None
    ) -> str:
        """The text of token ids. Special tokens are left out unless skip_special_tokens is False."""
        ids = token_ids_of(token_ids)
        request = build(inference_pb2.DetokenizeRequest, token_ids=ids, skip_special_tokens=skip_special_tokens)
        return (await self._call(self._inference.Detokenize, request, metadata=REPLY_LIMIT)).text

    async def model_info(self) -> inference_pb2.GetModelInfoResponse:
        return await self._call(self._inference.GetModelInfo, inference_pb2.GetModelInfoRequest())

    async def server_info(self) -> control_pb2.GetServerInfoResponse:
        return await self._call(self._control.GetServerInfo, control_pb2.GetServerInfoRequest())

    async def load(self) -> control_pb2.GetLoadResponse:
        return await self._call(self._control.GetLoad, control_pb2.GetLoadRequest())

    async def metrics(self, accept: str = "") -> control_pb2.GetMetricsResponse:
        """The server's metrics as Prometheus reads them. accept: as in the header of that name."""
        return await self._call(self._control.GetMetrics, build(control_pb2.GetMetricsRequest, accept=accept))

    async def abort(self, request_id: str) -> None:
        await self._call(self._control.Abort, build(control_pb2.AbortRequest, request_id=request_id), max_retries=0)

    async def drain(self, timeout_s: float | None = None) -> None:
        """Makes the server refuse new requests, and returns once the running ones have ended."""
        await self._call(self._control.Drain, control_pb2.DrainRequest(), timeout_s=timeout_s, max_retries=0)

    async def undrain(self) -> None:
        """Makes the server take new requests again."""
        await self._call(self._control.Undrain, control_pb2.UndrainRequest(), max_retries=0)

    async def reset_prefix_cache(self) -> int:
        """Empties the server's prefix cache; returns the number of KV blocks that were in it."""
        request = control_pb2.ResetPrefixCacheRequest()
        return (await self._call(self._control.ResetPrefixCache, request, max_retries=0)).num_forgotten_blocks

    async def _call(
        self,
        method: Callable[..., Awaitable[T]],
        request: object,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        max_retries: int | None = None,
    ) -> T:
        attempts = Attempts(self._max_retries if max_retries is None else max_retries, timeout_s)
        while True:
            try:
                return await method(
                    request, timeout=attempts.time_left_s(), metadata=metadata_of(self._metadata, metadata)
                )
            except grpc.RpcError as failure:
                pause_s = attempts.pause_after(failure)
            await asyncio.sleep(pause_s)
