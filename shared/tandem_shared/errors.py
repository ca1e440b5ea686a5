"""The errors that Tandem raises on purpose. Anything else that escapes is a bug and ends as INTERNAL.

TandemError
├── InvalidRequest            INVALID_ARGUMENT, BadRequest field violations
├── RequestIdInUse            ALREADY_EXISTS
├── RequestNotFound           NOT_FOUND
├── RetryLater
│   ├── QueueFull             RESOURCE_EXHAUSTED, RetryInfo
│   ├── Draining              UNAVAILABLE, RetryInfo
│   └── WorkerUnavailable     UNAVAILABLE, RetryInfo
├── RequestTooSlow            DEADLINE_EXCEEDED: the request did not arrive in time
├── DeadlinePassed            DEADLINE_EXCEEDED: the call's deadline passed before its turn came
├── Unauthenticated           UNAUTHENTICATED: the caller has not shown who it is
├── SequenceFailed            INTERNAL: the worker could not compute this one sequence
├── TextFailed                INTERNAL: the tokenizer failed on this one request
├── OutputTooLarge            RESOURCE_EXHAUSTED: a reply, or what a slow reader left, is past its limit
├── WorkerFailed              INTERNAL: a step failed, and the worker ends
├── SessionRefused            FAILED_PRECONDITION: wrong protocol version or worker instance
├── SessionTaken              ABORTED: another scheduler, or a newer epoch, holds the session
├── InvalidPlan               INVALID_ARGUMENT: the batch cannot follow the plan
├── UnexpectedMessage         INVALID_ARGUMENT: a stream's message that may not come there
├── ProtocolError             INTERNAL: one of our own processes broke the protocol
├── ModelError                the model folder cannot be served; names file and key
└── ConfigError               a setting is wrong; names it
"""

from dataclasses import dataclass


class TandemError(Exception):
    """Base of all of them. Its text is for the user."""


@dataclass(frozen=True)
class FieldViolation:
    """`field` is the request field's path in protobuf JSON style, for example `sampling.top_p`."""

    field: str
    description: str


class InvalidRequest(TandemError):
    """The request is wrong, and would be tomorrow."""

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class RequestIdInUse(TandemError):
    """A live request has this id."""


class RequestNotFound(TandemError):
    """No live request has this id."""


class RetryLater(TandemError):
    """Base of the refusals that pass with time; `retry_after_s` is the advice given in RetryInfo."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(RetryLater):
    """The bounded queue is full."""


class Draining(RetryLater):
    """The server takes no new requests."""


class WorkerUnavailable(RetryLater):
    """No worker with the right model came back in the stated time."""


class RequestTooSlow(TandemError):
    """The client opened a call and did not send its request in time."""


class DeadlinePassed(TandemError):
    """The call's deadline passed before its turn came."""


class Unauthenticated(TandemError):
    """The caller has not shown who it is."""


class WorkerFailed(TandemError):
    """A step failed on the worker, which ends: its last word."""


class SequenceFailed(TandemError):
    """This sequence could not be computed; others were."""


class TextFailed(TandemError):
    """The tokenizer failed on this request's text or tokens; other requests go on."""


class OutputTooLarge(TandemError):
    """A reply is larger than its client takes, or too much output waits for its reader."""


class SessionRefused(TandemError):
    """The session does not fit this worker."""


class SessionTaken(TandemError):
    """The session belongs to another."""


class InvalidPlan(TandemError):
    """The batch cannot follow this plan; nothing of it was applied."""


class ModelError(TandemError):
    """The model folder cannot be served."""


class ConfigError(TandemError):
    """A setting is missing, unknown or out of range."""


class UnexpectedMessage(TandemError):
    """A caller's stream has a message that may not come there; the stream can't go on."""


class ProtocolError(TandemError):
    """What one of our own services or processes told another breaks the protocol between them."""
