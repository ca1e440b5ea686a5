"""Errors of every kind as OpenAI's API has them: a status and {"error": {"message", "type", "param", "code"}}."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tandem_gateway.events import encoded
from tandem_gateway.problems import problems_of, violations_of
from tandem_gateway.traces import note_error
from tandem_shared.errors import FieldViolation, InvalidApiKey, InvalidRequest, OutputTooLarge, RetryLater, TandemError
from tandem_shared.rpc.rich_status import code_of

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
"""nginx's status of a request whose client closed the connection. Nobody reads it but logs and tests."""

HTTP_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.CANCELLED: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""gRPC status -> HTTP status. The others are 500."""

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""HTTP status -> OpenAI's type of error. Others are invalid_request_error below 500 and server_error above."""


class ApiError(Exception):
    """An error of the gateway's own."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class ClientGone(ApiError):
    """The client closed the connection before its answer was complete."""

    def __init__(self) -> None:
        super().__init__(CLIENT_GONE, "the client closed the connection")


def error_body(error: Exception) -> dict[str, Any]:
    """The JSON object of an error that ends a stream."""
    described = _described(error)
    note_error(described[1], described[0])
    return _body(*described)


def _body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    type_ = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


class JsonAnswer(JSONResponse):
    """An answer that may repeat whatever text a client sent."""

    def render(self, content: Any) -> bytes:
        return encoded(content)


def error_response(error: Exception, request: Request | None = None) -> JsonAnswer:
    """request: the one whose body the error may be about."""
    described = _described(error, request)
    status = described[0]
    headers = {}
    if status in (429, 503):
        # Clients try again after whole seconds, by the header's definition.
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)) if isinstance(error, RetryLater) else 1)
    if status == CLIENT_GONE:
        note_error(described[1], status)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 405 and isinstance(error, HTTPException):
        headers.update(error.headers or {})
    return JsonAnswer(_body(*described), status, headers)


def add_error_handlers(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> JsonAnswer:
        return error_response(error, request)

    for each in (ApiError, TandemError, grpc.RpcError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(each, answer)


def _described(error: Exception, request: Request | None = None) -> tuple[int, str, str | None, str | None]:
    """Status, message, param and code."""
    if isinstance(error, ApiError):
        return error.status, str(error), error.param, error.code
    if isinstance(error, InvalidRequest):
        refusal = _refusal(violations_of(error, request))
        return (404, *refusal[1:3], "model_not_found") if refusal[2] == "model" else refusal
    if isinstance(error, OutputTooLarge):
        return 400, str(error), None, "output_too_large"
    if isinstance(error, InvalidApiKey):
        return 401, str(error), None, "invalid_api_key"
    if isinstance(error, TandemError):
        return HTTP_STATUSES.get(code_of(error), 500), str(error), None, None
    if isinstance(error, grpc.aio.AioRpcError):
        return _grpc_error(error)
    if isinstance(error, RequestValidationError):
        return _refusal(problems_of(error))
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None, None
    logger.error("a request failed", exc_info=error)
    return 500, "an internal error of the gateway", None, None


def _refusal(violations: Sequence[FieldViolation]) -> tuple[int, str, str | None, str | None]:
    message = "; ".join(f"{each.field}: {each.description}" if each.field else each.description for each in violations)
    return 400, message or "the request is not valid", (violations[0].field or None) if violations else None, None


def _grpc_error(error: grpc.aio.AioRpcError) -> tuple[int, str, str | None, str | None]:
    """An error that is not one of Tandem's: gRPC's own, or one of a proxy or interceptor before the scheduler."""
    status = HTTP_STATUSES.get(error.code(), 500)
    message = error.details() or error.code().name
    if status == 401:
        return status, message, None, "invalid_api_key"
    if status == 429 and "larger than max" in message:
        # gRPC's own refusal of a request above the scheduler's --max-request-bytes.
        return 413, "the request is larger than the scheduler takes", None, None
    if status == 503:
        return status, f"the scheduler can't be reached: {message}", None, None
    return status, message, None, None
