"""The errors that Tandem raises on purpose. Anything else that escapes is a bug and ends as INTERNAL.

The tree states the gRPC status of each class and the google.rpc details beside ErrorInfo. ErrorInfo's reason is the
name of the class as UPPER_SNAKE_CASE, for example QUEUE_FULL; protos list the reasons, in tandem.v1.ErrorReason and for
the internal services in tandem.internal.v1.ErrorReason. tandem_shared/rpc/rich_status.py writes and reads the statuses.

TandemError
├── InvalidRequest            INVALID_ARGUMENT, BadRequest field violations
├── RequestIdInUse            ALREADY_EXISTS
├── RequestNotFound           NOT_FOUND
├── InvalidApiKey             UNAUTHENTICATED: the call has no API key, or one that is not known
├── PermissionDenied          PERMISSION_DENIED: the call's API key is not for this
├── Undrained                 ABORTED: Undrain was called while Drain waited
├── RetryLater
│   ├── QueueFull             RESOURCE_EXHAUSTED, RetryInfo
│   ├── Draining              UNAVAILABLE, RetryInfo
│   └── WorkerUnavailable     UNAVAILABLE, RetryInfo
├── RequestTooSlow            DEADLINE_EXCEEDED: the request did not arrive in time
├── DeadlinePassed            DEADLINE_EXCEEDED: the call's deadline passed before the request was started
├── SequenceFailed            INTERNAL: the engine failed on this one request
├── TextFailed                INTERNAL: the tokenizer or the chat template failed on this one request
├── OutputTooLarge            RESOURCE_EXHAUSTED: a reply, or what a slow reader left, is past its limit
├── ProtocolError             INTERNAL: one of our own processes broke the protocol
├── Unauthenticated           UNAUTHENTICATED (internal): the caller did not show the session secret
├── SessionRefused            FAILED_PRECONDITION (internal): wrong protocol version or worker instance
├── SessionTaken              ABORTED (internal): another scheduler, or a newer epoch, holds the session
├── InvalidPlan               INVALID_ARGUMENT (internal): the batch cannot follow the plan
├── UnexpectedMessage         INVALID_ARGUMENT (internal): a stream's message that may not come there
├── WorkerFailed              INTERNAL (internal): a step failed, and the worker ends
├── ModelError                never sent: the model folder cannot be served; names file and key
└── ConfigError               never sent: a setting is wrong; names it
"""

import re
from dataclasses import dataclass


class TandemError(Exception):
    """The base class of all errors. The text of an error is for the user."""


@dataclass(frozen=True)
class FieldViolation:
    """One thing that is wrong with a request. `field` is the path of the field, for example `sampling.top_p`; empty for
    the request as a whole.
    """

    field: str
    description: str


class InvalidRequest(TandemError):
    """The request breaks a rule of the API, and would do so again."""

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class RequestIdInUse(TandemError):
    """A live request has the same id."""


class RequestNotFound(TandemError):
    """No live request has this id."""


class InvalidApiKey(TandemError):
    """The call has no API key, or one that the server does not know."""


class PermissionDenied(TandemError):
    """The call's API key is not for what it asks."""


class Undrained(TandemError):
    """Undrain was called while Drain waited for requests to end."""


class RetryLater(TandemError):
    """The base class of refusals that pass with time. `retry_after_s` is the advice, in seconds, given in RetryInfo."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(RetryLater):
    """Too many requests wait, or too many calls are open."""


class Draining(RetryLater):
    """The server takes no new requests."""


class WorkerUnavailable(RetryLater):
    """There is no worker that could run the request, or the server is stopping."""


class RequestTooSlow(TandemError):
    """The client opened a call and did not send its request in time."""


class DeadlinePassed(TandemError):
    """The call's deadline passed before the request was started."""


class Unauthenticated(TandemError):
    """The caller did not show the session secret."""


class WorkerFailed(TandemError):
    """A step failed, and the worker's process ends; the text says why."""


class SequenceFailed(TandemError):
    """The engine failed on this request; other requests go on."""


class TextFailed(TandemError):
    """The tokenizer failed on this request's text or tokens, or its chat template took too much time or memory; other
    requests go on.
    """


class OutputTooLarge(TandemError):
    """A reply is larger than its client takes, or the reader of a stream is too far behind."""


class SessionRefused(TandemError):
    """The session asks for another protocol version or worker instance."""


class SessionTaken(TandemError):
    """Another scheduler, or a newer epoch of the same one, holds the session."""


class InvalidPlan(TandemError):
    """The worker's batch cannot follow the plan, of which nothing was applied."""


class ModelError(TandemError):
    """The model folder cannot be served. The text names the file and the key."""


class ConfigError(TandemError):
    """A setting is missing, unknown or out of range. The text names it."""


class UnexpectedMessage(TandemError):
    """A stream holds a message that may not come at this place."""


class ProtocolError(TandemError):
    """A message from one of our own processes breaks the protocol between them."""


def reason_of(error_class: type[TandemError]) -> str:
    """The reason in ErrorInfo: the name of the class as UPPER_SNAKE_CASE."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", error_class.__name__).upper()
