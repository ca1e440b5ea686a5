"""How the interceptor ends calls that gRPC has ended already. The contract tests have the rest of it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from tandem_shared.errors import DeadlinePassed
from tandem_shared.rpc.error_interceptor import CallLimits, _wrap_awaited, _wrap_generator


class GoneContext:
    """The context of a call that gRPC has ended without having told Python yet."""

    def peer(self) -> str:
        return "peer"

    async def abort(self, *end: Any) -> None:
        raise grpc.aio.InternalError("the batch failed")


async def read_request(requests: AsyncIterator[bytes], peer: str) -> bytes:
    return b""


async def fail(request: bytes, context: Any) -> bytes:
    raise DeadlinePassed("too late")


async def fail_streaming(request: bytes, context: Any) -> AsyncIterator[bytes]:
    raise DeadlinePassed("too late")
    yield b""


async def test_an_error_for_a_call_that_is_gone_ends_it_as_a_cancelled_one() -> None:
    awaited = _wrap_awaited(fail, read_request, CallLimits(), lambda error: None)
    with pytest.raises(asyncio.CancelledError):
        await awaited(None, GoneContext())
    generator = _wrap_generator(fail_streaming, read_request, CallLimits(), lambda error: None)
    with pytest.raises(asyncio.CancelledError):
        await anext(generator(None, GoneContext()))
