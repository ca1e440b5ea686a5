"""Tandem's errors as gRPC statuses with google.rpc details, and back. The server writes what the client reads."""

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from tandem_shared import errors
from tandem_shared.errors import FieldViolation, InvalidRequest, RetryLater, TandemError

DETAILS_METADATA_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "tandem"

MAX_TEXT_BYTES = 1024
"""Of an error's text. It travels twice, once percent-encoded, which may triple it, in metadata for which a client
takes 8 KiB; past that the client sees RESOURCE_EXHAUSTED in place of the error."""

MAX_VIOLATION_BYTES = 512
MAX_VIOLATIONS_BYTES = 2048
"""Of the text of one violation, and of all together; those that don't fit are counted in one more."""

ELLIPSIS = "..."

STATUS_CODES: dict[type[TandemError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.RequestIdInUse: grpc.StatusCode.ALREADY_EXISTS,
    errors.RequestNotFound: grpc.StatusCode.NOT_FOUND,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.WorkerUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.RequestTooSlow: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.WorkerFailed: grpc.StatusCode.INTERNAL,
    errors.SequenceFailed: grpc.StatusCode.INTERNAL,
    errors.TextFailed: grpc.StatusCode.INTERNAL,
    errors.OutputTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.SessionRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SessionTaken: grpc.StatusCode.ABORTED,
    errors.InvalidPlan: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnexpectedMessage: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ProtocolError: grpc.StatusCode.INTERNAL,
}


def code_of(error: TandemError) -> grpc.StatusCode:
    """Of the error's class, or of the nearest one that it derives from."""
    return next((STATUS_CODES[c] for c in type(error).__mro__ if c in STATUS_CODES), grpc.StatusCode.INTERNAL)


def status_of(error: TandemError) -> status_pb2.Status:
    """ErrorInfo always; BadRequest for a wrong request; RetryInfo where waiting helps."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=ERROR_DOMAIN)]
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
    """The TandemError that a server sent; `error` itself where it is none."""
    trailing: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    status = status_pb2.Status()
    for key, value in trailing or ():
        if key == DETAILS_METADATA_KEY:
            status.ParseFromString(value)
    return read_status(status) or error


def read_status(status: status_pb2.Status) -> TandemError | None:
    """The error that status_of() wrote; None where it was none of Tandem's."""
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for message in (info, bad_request, retry):
            detail.Unpack(message)
    classes = {error_class.__name__: error_class for error_class in STATUS_CODES}
    if info.domain != ERROR_DOMAIN or info.reason not in classes:
        return None
    error_class = classes[info.reason]
    if error_class is InvalidRequest:
        return InvalidRequest(*(FieldViolation(v.field, v.description) for v in bad_request.field_violations))
    if issubclass(error_class, RetryLater):
        return error_class(status.message, retry.retry_delay.ToMilliseconds() / 1000)
    return error_class(status.message)


def _fitting(violations: Sequence[FieldViolation]) -> list[FieldViolation]:
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
    """Changes nothing the second time: an error may pass several processes."""
    data = text.encode(errors="replace")
    is_short = len(data) <= max_bytes + len(ELLIPSIS)
    return text if is_short else data[:max_bytes].decode(errors="ignore") + ELLIPSIS
