"""Tandem's errors as gRPC statuses with google.rpc details, and back. The server writes what the client reads."""

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from tandem_shared import errors
from tandem_shared.errors import FieldViolation, InvalidRequest, RetryLater, TandemError, reason_of

DETAILS_METADATA_KEY = "grpc-status-details-bin"

DOMAIN, INTERNAL_DOMAIN = "tandem.v1", "tandem.internal.v1"
"""The domain of ErrorInfo is the package whose enum ErrorReason lists the reason. It is as unique as the API's name,
and claims no Internet domain, as Tandem has none."""

MAX_TEXT_BYTES = 1024
"""The longest text of an error. It is sent twice, once percent-encoded, which may triple it, in metadata of which a
client takes 8 KiB. Past that the client sees RESOURCE_EXHAUSTED in place of the error."""

MAX_VIOLATION_BYTES = 512
MAX_VIOLATIONS_BYTES = 2048
"""The longest text of one violation, and of all together. Violations that don't fit are counted in one more."""

ELLIPSIS = "..."

PUBLIC_STATUS_CODES: dict[type[TandemError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.RequestIdInUse: grpc.StatusCode.ALREADY_EXISTS,
    errors.RequestNotFound: grpc.StatusCode.NOT_FOUND,
    errors.InvalidApiKey: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Undrained: grpc.StatusCode.ABORTED,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.WorkerUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.RequestTooSlow: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.SequenceFailed: grpc.StatusCode.INTERNAL,
    errors.TextFailed: grpc.StatusCode.INTERNAL,
    errors.OutputTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ProtocolError: grpc.StatusCode.INTERNAL,
}
"""The errors that clients of the public API may see. Internal services return them too."""

INTERNAL_STATUS_CODES: dict[type[TandemError], grpc.StatusCode] = {
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.SessionRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SessionTaken: grpc.StatusCode.ABORTED,
    errors.InvalidPlan: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnexpectedMessage: grpc.StatusCode.INVALID_ARGUMENT,
    errors.WorkerFailed: grpc.StatusCode.INTERNAL,
}
"""The errors that only internal services return."""


STATUS_CODES = PUBLIC_STATUS_CODES | INTERNAL_STATUS_CODES

CLASSES = {
    (domain, reason_of(error_class)): error_class
    for domain, codes in ((DOMAIN, PUBLIC_STATUS_CODES), (INTERNAL_DOMAIN, INTERNAL_STATUS_CODES))
    for error_class in codes
}
"""The class of an error by ErrorInfo's domain and reason."""


def code_of(error: TandemError) -> grpc.StatusCode:
    """The gRPC status of an error. INTERNAL for one that is not meant to be sent."""
    error_class = _sent_class(error)
    return STATUS_CODES[error_class] if error_class is not None else grpc.StatusCode.INTERNAL


def status_of(error: TandemError) -> status_pb2.Status:
    """The status of an error: with ErrorInfo for one that is meant to be sent, BadRequest for an invalid request, and
    RetryInfo where waiting helps.
    """
    details: list[Message] = []
    if (error_class := _sent_class(error)) is not None:
        domain = DOMAIN if error_class in PUBLIC_STATUS_CODES else INTERNAL_DOMAIN
        details.append(error_details_pb2.ErrorInfo(reason=reason_of(error_class), domain=domain))
    if isinstance(error, InvalidRequest):
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
            for v in _fitting(error.violations)
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if isinstance(error, RetryLater):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(retry)
    status = status_pb2.Status(code=code_of(error).value[0], message=_shortened(str(error), MAX_TEXT_BYTES))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def error_of(error: grpc.RpcError) -> Exception:
    """The TandemError that a server sent, or `error` itself if its status is not one of Tandem's."""
    trailing: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    status = status_pb2.Status()
    for key, value in trailing or ():
        if key == DETAILS_METADATA_KEY:
            status.ParseFromString(value)
    return read_status(status) or error


def read_status(status: status_pb2.Status) -> TandemError | None:
    """The error that status_of() wrote, or None if the status is not one of Tandem's."""
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for message in (info, bad_request, retry):
            detail.Unpack(message)
    error_class = CLASSES.get((info.domain, info.reason))
    if error_class is None:
        return None
    if error_class is InvalidRequest:
        return InvalidRequest(*(FieldViolation(v.field, v.description) for v in bad_request.field_violations))
    if issubclass(error_class, RetryLater):
        return error_class(status.message, retry.retry_delay.ToMilliseconds() / 1000)
    return error_class(status.message)


def _sent_class(error: TandemError) -> type[TandemError] | None:
    """The error's class, or the nearest class it derives from, that has a status."""
    return next((each for each in type(error).__mro__ if each in STATUS_CODES), None)


def _fitting(violations: Sequence[FieldViolation]) -> list[FieldViolation]:
    """As many violations as fit MAX_VIOLATIONS_BYTES, and one that counts the rest."""
    fitting: list[FieldViolation] = []
    num_bytes = 0
    for violation in violations:
        description = _shortened(violation.description, MAX_VIOLATION_BYTES)
        num_bytes += len(violation.field.encode()) + len(description.encode())
        if num_bytes > MAX_VIOLATIONS_BYTES:
            fitting.append(FieldViolation("", f"and {len(violations) - len(fitting)} more"))
            break
        fitting.append(FieldViolation(violation.field, description))
    return fitting


def _shortened(text: str, max_bytes: int) -> str:
    """The text, cut to about max_bytes of UTF-8. A text that was cut is not cut again: an error may pass several
    processes.
    """
    data = text.encode(errors="replace")
    is_short = len(data) <= max_bytes + len(ELLIPSIS)
    return text if is_short else data[:max_bytes].decode(errors="ignore") + ELLIPSIS
