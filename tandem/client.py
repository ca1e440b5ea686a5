"""A client of a scheduler service. It returns tandem.v1 messages and raises the errors of tandem_shared.errors.

tandem/async_client.py has the same for asyncio.
"""

import time
from collections.abc import Callable, Iterator, Sequence
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
from tandem_shared.rpc.grpc_options import client_options

T = TypeVar("T")


class TandemClient:
    """One connection to a server. Threads may share it. A request that the server refuses raises the TandemError that
    the server sent; failures of the transport, passed deadlines among them, raise grpc.RpcError.

    A call is repeated if the server refuses it for a while (RetryLater) or its connection fails, and nothing of its
    answer has been seen; so a stream is repeated only before its first message. Aborting, draining and resetting are
    not repeated. If a connection was lost, the repeated call of a request_id may end RequestIdInUse, as long as the
    server has not noticed the loss.
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
        options = client_options(address)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, credentials, options)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)
        self._metadata = metadata
        self._max_retries = max_retries

    def __enter__(self) -> "TandemClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Calls that are under way end with an error."""
        self._channel.close()

    def generate(
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
        """Returns the whole output of a prompt. After timeout_s seconds the server drops the request. A request of a
        lower priority number is served earlier. Only requests with an equal cache_salt share cached prefixes.
        """
        request = build(
            inference_pb2.GenerateRequest, **request_fields(prompt, params, request_id, priority, cache_salt)
        )
        metadata = metadata_of(REPLY_LIMIT, metadata)
        return self._call(self._inference.Generate, request, timeout_s=timeout_s, metadata=metadata)

    def generate_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
        metadata: Metadata = (),
    ) -> Iterator[inference_pb2.GenerateStreamResponse]:
        """Yields the output while it is generated. Closing the iterator aborts the request."""
        request = build(
            inference_pb2.GenerateStreamRequest, **request_fields(prompt, params, request_id, priority, cache_salt)
        )
        attempts = Attempts(self._max_retries, timeout_s)
        while True:
            call = self._inference.GenerateStream(
                request, timeout=attempts.time_left_s(), metadata=metadata_of(self._metadata, metadata)
            )
            try:
                for delta in call:
                    attempts.end()
                    yield delta
                return
            except grpc.RpcError as failure:
                pause_s = attempts.pause_after(failure)
            finally:
                call.cancel()
            time.sleep(pause_s)

    def tokenize(self, text: str | Chat, *, add_special_tokens: bool | None = None) -> list[int]:
        """The token ids of a text or a conversation. Around a text the tokenizer puts its special tokens, unless
        add_special_tokens is False; a conversation has them from the model's chat template.
        """
        fields = {"chat": text.message} if isinstance(text, Chat) else {"text": text}
        request = build(inference_pb2.TokenizeRequest, **fields, add_special_tokens=add_special_tokens)
        return list(self._call(self._inference.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int] | ArrayOfIds, *, skip_special_tokens: bool | None = None) -> str:
        """The text of token ids. Special tokens are left out unless skip_special_tokens is False."""
        ids = token_ids_of(token_ids)
        request = build(inference_pb2.DetokenizeRequest, token_ids=ids, skip_special_tokens=skip_special_tokens)
        return self._call(self._inference.Detokenize, request, metadata=REPLY_LIMIT).text

    def model_info(self) -> inference_pb2.GetModelInfoResponse:
        return self._call(self._inference.GetModelInfo, inference_pb2.GetModelInfoRequest())

    def server_info(self) -> control_pb2.GetServerInfoResponse:
        return self._call(self._control.GetServerInfo, control_pb2.GetServerInfoRequest())

    def load(self) -> control_pb2.GetLoadResponse:
        return self._call(self._control.GetLoad, control_pb2.GetLoadRequest())

    def metrics(self, accept: str = "") -> control_pb2.GetMetricsResponse:
        """The server's metrics as Prometheus reads them. accept: as in the header of that name."""
        return self._call(self._control.GetMetrics, build(control_pb2.GetMetricsRequest, accept=accept))

    def abort(self, request_id: str) -> None:
        self._call(self._control.Abort, build(control_pb2.AbortRequest, request_id=request_id), max_retries=0)

    def drain(self, timeout_s: float | None = None) -> None:
        """Makes the server refuse new requests, and returns once the running ones have ended."""
        self._call(self._control.Drain, control_pb2.DrainRequest(), timeout_s=timeout_s, max_retries=0)

    def undrain(self) -> None:
        """Makes the server take new requests again."""
        self._call(self._control.Undrain, control_pb2.UndrainRequest(), max_retries=0)

    def reset_prefix_cache(self) -> int:
        """Empties the server's prefix cache; returns the number of KV blocks that were in it."""
        request = control_pb2.ResetPrefixCacheRequest()
        return self._call(self._control.ResetPrefixCache, request, max_retries=0).num_forgotten_blocks

    def _call(
        self,
        method: Callable[..., T],
        request: object,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        max_retries: int | None = None,
    ) -> T:
        attempts = Attempts(self._max_retries if max_retries is None else max_retries, timeout_s)
        while True:
            try:
                return method(request, timeout=attempts.time_left_s(), metadata=metadata_of(self._metadata, metadata))
            except grpc.RpcError as failure:
                pause_s = attempts.pause_after(failure)
            time.sleep(pause_s)
