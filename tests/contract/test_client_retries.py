"""Both clients, and LLM, against a server that fails as told: what they repeat, and the metadata that they send."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from tandem import LLM, AsyncTandemClient, RequestOutput, TandemClient
from tandem.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tandem_shared.errors import InvalidRequest, QueueFull, TandemError
from tandem_shared.rpc.error_interceptor import DETAILS_METADATA_KEY
from tandem_shared.rpc.rich_status import code_of, status_of

CLIENTS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
FULL = QueueFull("full", retry_after_s=0.01)
LOST = grpc.StatusCode.UNAVAILABLE


class FailingServer:
    """Answers calls with the failures in its list, and then well. It keeps the calls' metadata."""

    def __init__(self) -> None:
        self.failures: list[TandemError | grpc.StatusCode] = []
        self.calls: list[dict[str, Any]] = []

    async def _fail(self, context: Any) -> None:
        self.calls.append(dict(context.invocation_metadata()))
        if not self.failures:
            return
        failure = self.failures.pop(0)
        if isinstance(failure, TandemError):
            context.set_trailing_metadata(((DETAILS_METADATA_KEY, status_of(failure).SerializeToString()),))
            await context.abort(code_of(failure), str(failure))
        else:
            await context.abort(failure, "fails")

    async def Generate(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        await self._fail(context)
        return inference_pb2.GenerateResponse(request_id="well")

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateStreamResponse]:
        await self._fail(context)
        yield inference_pb2.GenerateStreamResponse(request_id="well")
        if request.request_id == "breaks":
            await context.abort(LOST, "breaks after a message")

    async def Abort(self, request: Any, context: Any) -> control_pb2.AbortResponse:
        await self._fail(context)
        return control_pb2.AbortResponse()


class Caller:
    """Calls one of the clients, whichever it is."""

    def __init__(self, address: str, is_async: bool) -> None:
        self._address, self._is_async = address, is_async

    async def __call__(self, name: str, *arguments: Any, is_stream: bool = False, **keywords: Any) -> Any:
        metadata, settings = (("Authorization", "Bearer A"),), {"max_retries": 2}
        if self._is_async:
            async with AsyncTandemClient(self._address, metadata=metadata, **settings) as client:
                method = getattr(client, name)(*arguments, **keywords)
                return [each async for each in method] if is_stream else await method

        def in_thread() -> Any:
            with TandemClient(self._address, metadata=metadata, **settings) as client:
                result = getattr(client, name)(*arguments, **keywords)
                return list(result) if is_stream else result

        return await asyncio.to_thread(in_thread)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.calls.FIRST_PAUSE_S", 0.01)


@pytest.fixture
async def server() -> AsyncIterator[tuple[FailingServer, str]]:
    servicer, server = FailingServer(), grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, _with_missing(servicer, server))
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(0)


def _with_missing(servicer: FailingServer, server: Any) -> Any:
    """Gives the servicer the methods that registering it asks for, and that no test calls."""
    others = ("GetModelInfo", "GetServerInfo", "GetLoad", "GetMetrics", "Drain", "Undrain", "ResetPrefixCache")
    for name in ("Tokenize", "Detokenize", *others):
        setattr(servicer, name, None)
    return server


@CLIENTS
async def test_refusals_and_lost_connections_are_repeated(server: tuple[FailingServer, str], is_async: bool) -> None:
    servicer, address = server
    call = Caller(address, is_async)
    servicer.failures = [FULL, LOST]
    assert (await call("generate", "x")).request_id == "well"
    servicer.failures = [LOST, FULL]
    assert [delta.request_id for delta in await call("generate_stream", "x", is_stream=True)] == ["well"]
    assert len(servicer.calls) == 6
    servicer.failures = [FULL] * 3
    with pytest.raises(QueueFull):
        await call("generate", "x")
    assert len(servicer.calls) == 9


@CLIENTS
async def test_what_may_have_had_an_effect_is_not_repeated(server: tuple[FailingServer, str], is_async: bool) -> None:
    servicer, address = server
    call = Caller(address, is_async)
    with pytest.raises(grpc.RpcError):
        await call("generate_stream", "x", request_id="breaks", is_stream=True)
    servicer.failures = [LOST]
    with pytest.raises(grpc.RpcError):
        await call("abort", "x")
    servicer.failures = [InvalidRequest(), grpc.StatusCode.UNKNOWN]
    with pytest.raises(InvalidRequest):
        await call("generate", "x")
    with pytest.raises(grpc.RpcError):
        await call("generate", "x")
    assert len(servicer.calls) == 4


@CLIENTS
async def test_a_deadline_is_for_all_attempts(server: tuple[FailingServer, str], is_async: bool) -> None:
    servicer, address = server
    servicer.failures = [QueueFull("full", retry_after_s=30)]
    with pytest.raises(QueueFull):
        await Caller(address, is_async)("generate", "x", timeout_s=5)
    assert len(servicer.calls) == 1


@CLIENTS
async def test_metadata_is_sent_with_each_call(server: tuple[FailingServer, str], is_async: bool) -> None:
    servicer, address = server
    call = Caller(address, is_async)
    await call("generate", "x", metadata=(("X-Request-Id", "1"),))
    await call("generate_stream", "x", is_stream=True, metadata=(("x-bin", b"\0"),))
    await call("abort", "x")
    assert all(each["authorization"] == "Bearer A" for each in servicer.calls)
    assert servicer.calls[0]["x-request-id"] == "1" and "tandem-max-reply-bytes" in servicer.calls[0]
    assert servicer.calls[1]["x-bin"] == b"\0"


async def test_llm_waits_for_a_full_server_as_long_as_it_takes(server: tuple[FailingServer, str]) -> None:
    servicer, address = server
    servicer.failures = [FULL] * 20

    def generate() -> list[RequestOutput]:
        with LLM(address=address) as llm:
            return llm.generate([[1], [2]], use_tqdm=False)

    outputs = await asyncio.to_thread(generate)
    assert [output.request_id for output in outputs] == ["well"] * 2
    assert len(servicer.calls) == 22
