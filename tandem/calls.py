"""What both clients share: their messages, their channels' options and metadata, and when a failed call is repeated."""

import random
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from tandem.chat import Chat
from tandem.sampling_params import SamplingParams
from tandem_shared.errors import FieldViolation, InvalidRequest, RetryLater
from tandem_shared.rpc.call_metadata import MAX_REPLY_BYTES_KEY
from tandem_shared.rpc.grpc_options import MAX_MESSAGE_BYTES
from tandem_shared.rpc.rich_status import error_of

M = TypeVar("M", bound=Message)


class ArrayOfIds(Protocol):
    """An array of whole numbers with one dimension, such as numpy's."""

    def tolist(self) -> Any: ...


Prompt: TypeAlias = str | Sequence[int] | ArrayOfIds | Chat
"""A text, the ids of its tokens, or a conversation."""

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
"""Names and values that are sent beside a request. The value of a name that ends with -bin is bytes."""

REPLY_LIMIT: Metadata = ((MAX_REPLY_BYTES_KEY, str(MAX_MESSAGE_BYTES)),)
"""Tells the server how large a reply this client takes; without it, servers keep to gRPC's default of 4 MiB."""

DEFAULT_MAX_RETRIES = 2
FIRST_PAUSE_S = 0.2
MAX_PAUSE_S = 5.0


class Attempts:
    """The attempts of one call.

    A failed attempt is repeated only if its client has seen nothing of an answer, and the failure may pass: the server
    said so (RetryLater), or the call ended UNAVAILABLE, as it does where a connection can't be made or is lost. The
    pause is what the server advises, or else doubles with each attempt.
    """

    def __init__(self, max_retries: int, timeout_s: float | None) -> None:
        """timeout_s: the time for all attempts and pauses together."""
        self._num_left = max_retries
        self._ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        self._pause_s = FIRST_PAUSE_S

    def time_left_s(self) -> float | None:
        """The time that the next attempt may take."""
        return None if self._ends_at is None else max(self._ends_at - time.monotonic(), 0.0)

    def end(self) -> None:
        """Something of the answer has been seen, so that no further attempt is made."""
        self._num_left = 0

    def pause_after(self, failure: grpc.RpcError) -> float:
        """The pause in seconds before the next attempt. If there is none, raises the call's error."""
        error = error_of(failure)
        pause_s = self._pause_s * random.uniform(0.75, 1.25)
        if isinstance(error, RetryLater):
            pause_s = max(pause_s, error.retry_after_s)
        time_left_s = self.time_left_s()
        is_in_time = time_left_s is None or pause_s < time_left_s
        if not (self._num_left > 0 and is_in_time and _may_pass(error)):
            raise error from failure
        self._num_left -= 1
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        return pause_s


def _may_pass(error: Exception) -> bool:
    # The errors of both kinds of gRPC client have a code, but no class in common that says so.
    is_unavailable = isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAVAILABLE
    return is_unavailable or isinstance(error, RetryLater)


def metadata_of(*parts: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata of a call, with the trace that it is part of. Names are case-insensitive; gRPC wants them in lower
    case.
    """
    given = tuple((name.lower(), value) for part in parts for name, value in part)
    if "opentelemetry.trace" not in sys.modules or any(name == "traceparent" for name, _ in given):
        return given
    # The program uses OpenTelemetry, so the span that is active there is the parent of the server's.
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    trace: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(trace)
    return (*given, *trace.items())


def request_fields(
    prompt: Prompt,
    params: SamplingParams | None,
    request_id: str | None,
    priority: int | None,
    cache_salt: str | None,
) -> dict[str, Any]:
    """The fields that both generate requests have."""
    return {
        "prompt": _prompt_fields(prompt),
        **params_fields(params or SamplingParams()),
        "request_id": request_id,
        "priority": priority,
        "cache_salt": cache_salt,
    }


def params_fields(params: SamplingParams) -> dict[str, Any]:
    """Those fields of a generate request that say how to sample and when to stop."""
    return {
        "sampling": params.sampling(),
        "stopping": params.stopping(),
        "output": params.output(),
        "structured_output": params.structured_output(),
        "num_choices": params.n,
    }


def build(message_class: type[M], **fields: Any) -> M:
    """A message. Raises InvalidRequest, which names the field, for a value that its field can't hold."""
    try:
        return message_class(**fields)
    except (TypeError, ValueError):
        for name, value in fields.items():
            try:
                message_class(**{name: value})
            except (TypeError, ValueError) as error:
                raise InvalidRequest(FieldViolation(name, str(error))) from error
        raise


def token_ids_of(ids: Sequence[int] | ArrayOfIds) -> Any:
    """Token ids as protobuf takes them, which numpy's arrays are not."""
    return ids.tolist() if hasattr(ids, "tolist") else ids


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    return {"chat": prompt.message} if isinstance(prompt, Chat) else {"token_ids": {"ids": token_ids_of(prompt)}}
