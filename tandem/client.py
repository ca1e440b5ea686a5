"""A client of a scheduler service. It returns tandem.v1 messages and raises the errors of tandem_shared.errors."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc

from tandem.sampling_params import SamplingParams
from tandem.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tandem_shared.errors import FieldViolation, InvalidRequest
from tandem_shared.rpc.call_metadata import MAX_REPLY_BYTES_KEY
from tandem_shared.rpc.grpc_options import MAX_MESSAGE_BYTES, client_options
from tandem_shared.rpc.rich_status import error_of

Prompt = str | Sequence[int]
"""Text, or the ids of its tokens."""

T = TypeVar("T")

Metadata = tuple[tuple[str, str], ...]

REPLY_LIMIT: Metadata = ((MAX_REPLY_BYTES_KEY, str(MAX_MESSAGE_BYTES)),)
"""Tells the server how large a reply this client takes; without it, servers keep to gRPC's default of 4 MiB."""


class TandemClient:
    """One connection to a server. Threads may share it. A request that the server refuses raises the TandemError that
    the server sent; failures of the transport, passed deadlines among them, raise grpc.RpcError.
    """

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        """address is HOST:PORT. With credentials the connection uses TLS. Connects when first used."""
        options = client_options(address)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, credentials, options)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)

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
    ) -> inference_pb2.GenerateResponse:
        """Returns the whole output of a prompt. After timeout_s seconds the server drops the request. A request of a
        lower priority number is served earlier. Only requests with an equal cache_salt share cached prefixes.
        """
        fields = _fields(prompt, params, request_id, priority, cache_salt)
        return _call(self._inference.Generate, inference_pb2.GenerateRequest(**fields), timeout_s, REPLY_LIMIT)

    def start_generate(self, prompt: Prompt, params: SamplingParams | None = None) -> "PendingReply":
        """Starts a generation and returns at once. The reply is fetched from what this returns."""
        request = inference_pb2.GenerateRequest(**_fields(prompt, params, None, None, None))
        return PendingReply(self._inference.Generate.future(request, metadata=REPLY_LIMIT))

    def generate_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[inference_pb2.GenerateStreamResponse]:
        """Yields the output while it is generated. Closing the iterator aborts the request."""
        fields = _fields(prompt, params, request_id, priority, cache_salt)
        call = self._inference.GenerateStream(inference_pb2.GenerateStreamRequest(**fields), timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    def tokenize(self, text: str) -> list[int]:
        return list(_call(self._inference.Tokenize, inference_pb2.TokenizeRequest(text=text)).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        request = inference_pb2.DetokenizeRequest(token_ids=token_ids)
        return _call(self._inference.Detokenize, request, metadata=REPLY_LIMIT).text

    def model_info(self) -> inference_pb2.GetModelInfoResponse:
        return _call(self._inference.GetModelInfo, inference_pb2.GetModelInfoRequest())

    def server_info(self) -> control_pb2.GetServerInfoResponse:
        return _call(self._control.GetServerInfo, control_pb2.GetServerInfoRequest())

    def load(self) -> control_pb2.GetLoadResponse:
        return _call(self._control.GetLoad, control_pb2.GetLoadRequest())

    def abort(self, request_id: str) -> None:
        _call(self._control.Abort, control_pb2.AbortRequest(request_id=request_id))

    def drain(self, timeout_s: float | None = None) -> None:
        """Makes the server refuse new requests, and returns once the running ones have ended."""
        _call(self._control.Drain, control_pb2.DrainRequest(), timeout_s)

    def reset_prefix_cache(self) -> int:
        """Empties the server's prefix cache; returns the number of KV blocks that were in it."""
        response = _call(self._control.ResetPrefixCache, control_pb2.ResetPrefixCacheRequest())
        return response.num_forgotten_blocks


class PendingReply:
    """A generation under way on the server."""

    def __init__(self, call: Any) -> None:
        """call is a grpc.Future of the reply."""
        self._call = call

    def result(self) -> inference_pb2.GenerateResponse:
        """Waits for the reply and returns it; raises what generate() raises."""
        try:
            response: inference_pb2.GenerateResponse = self._call.result()
        except grpc.RpcError as error:
            raise error_of(error) from error
        return response

    def cancel(self) -> None:
        """Aborts the request, unless it has ended."""
        self._call.cancel()

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Calls callback once, in another thread, when the request has ended, whether with a reply or an error."""
        self._call.add_done_callback(lambda _: callback())


def _fields(
    prompt: Prompt,
    params: SamplingParams | None,
    request_id: str | None,
    priority: int | None,
    cache_salt: str | None,
) -> dict[str, Any]:
    """The fields that both generate requests have. Raises InvalidRequest for a value that its field can't hold."""
    params = params or SamplingParams()
    fields = {
        "prompt": {"text": prompt} if isinstance(prompt, str) else {"token_ids": {"ids": prompt}},
        "sampling": params.sampling(),
        "stopping": params.stopping(),
        "output": params.output(),
        "structured_output": params.structured_output(),
        "num_choices": params.n,
        "request_id": request_id,
        "priority": priority,
        "cache_salt": cache_salt,
    }
    for name, value in fields.items():
        try:
            inference_pb2.GenerateRequest(**{name: value})  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InvalidRequest(FieldViolation(name, str(error))) from error
    return fields


def _call(
    method: Callable[..., T], request: object, timeout_s: float | None = None, metadata: Metadata | None = None
) -> T:
    try:
        return method(request, timeout=timeout_s, metadata=metadata)
    except grpc.RpcError as error:
        raise error_of(error) from error
