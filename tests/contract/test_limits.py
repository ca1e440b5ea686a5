"""The limits on what a client may ask for, over real gRPC: prompts, ids, replies, and output that is not read."""

import threading
from typing import Any

import grpc
import pytest

from tandem.client import REPLY_LIMIT
from tandem.v1 import control_pb2, inference_pb2, inference_pb2_grpc
from tandem_scheduler.front_end import front_end, live_request
from tandem_scheduler.front_end.grpc_api.inference_servicer import MIN_TOKEN_LIMIT
from tandem_shared.rpc.call_metadata import MAX_REPLY_BYTES_KEY
from tandem_shared.rpc.error_interceptor import DETAILS_METADATA_KEY
from tests.contract.services import Services, model_info, read_stream, stream_request, true_tokens, violations
from tests.support.fake_worker import FakeRunner

LARGE_OUTPUT: dict[str, Any] = {"num_choices": 64, "max_tokens": 240, "num_logprobs": 20}
"""A reply of some 6.5 MB, and 4.7 MB without the tokens' texts."""


def unary(request: inference_pb2.GenerateStreamRequest) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest.FromString(request.SerializeToString())


def at_most(num_bytes: object) -> tuple[tuple[str, str]]:
    return ((MAX_REPLY_BYTES_KEY, str(num_bytes)),)


async def test_an_id_to_abort_has_the_limits_of_a_request_id() -> None:
    async with Services() as services:
        for request_id in ("x" * 257, "a\nb"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await services.control.Abort(control_pb2.AbortRequest(request_id=request_id))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert list(violations(caught.value)) == ["request_id"]


async def test_requests_share_prefixes_with_those_of_their_salt_alone() -> None:
    def request(salt: str) -> inference_pb2.GenerateStreamRequest:
        return stream_request([7] * 100, 1, cache_salt=salt)

    async with Services() as services:
        cached = [(await services.stream(request(salt))).usage.num_cached_tokens for salt in ("a", "b", "a", "", "")]
    assert cached == [0, 0, 96, 0, 96]


async def test_stop_strings_by_the_million_are_refused_undecoded() -> None:
    request = stream_request(stop_strings=[""] * 1_000_000)
    async with Services() as services:
        for call in (services.stream(request), services.generate(request)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "beside the prompt" in caught.value.details()


async def test_tokenize_and_detokenize_have_limits() -> None:
    async with Services() as services:
        most = [500] * MIN_TOKEN_LIMIT
        text = (await services.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=most))).text
        calls = {
            "token_ids": services.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[*most, 500])),
            "text": services.inference.Tokenize(inference_pb2.TokenizeRequest(text="x y " * MIN_TOKEN_LIMIT)),
        }
        for field, call in calls.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert list(violations(caught.value)) == [field]
    assert len(text) >= MIN_TOKEN_LIMIT


async def test_a_text_that_is_larger_than_its_client_takes_is_refused() -> None:
    request = inference_pb2.DetokenizeRequest(token_ids=[500] * 1000)
    async with Services() as services:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.inference.Detokenize(request, metadata=at_most(1000))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert DETAILS_METADATA_KEY in caught.value.trailing_metadata()


async def test_a_reply_that_a_stock_client_would_lose_is_refused_at_once() -> None:
    async with Services() as services:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.generate(stream_request(**LARGE_OUTPUT))
        assert (await services.load()).num_steps == 0
    assert list(violations(caught.value)) == ["stopping.max_tokens"]
    assert "GenerateStream" in str(caught.value.details()) and "tandem-max-reply-bytes" in str(caught.value.details())


async def test_a_client_that_takes_more_gets_a_reply_past_grpcs_own_limit() -> None:
    request = stream_request([1, 2, 3], seed=5, temperature=1.0, **LARGE_OUTPUT)
    async with Services() as services:
        reply = await services.inference.Generate(unary(request), metadata=REPLY_LIMIT)
    assert reply.ByteSize() > 4 * 2**20
    assert [choice.choice_index for choice in reply.choices] == list(range(64))
    for index in (0, 63):
        assert list(reply.choices[index].token_ids) == true_tokens(request, choice_index=index)
    for choice in reply.choices:
        assert [report.token_id for report in choice.logprobs] == list(choice.token_ids)
        assert {len(report.top) for report in choice.logprobs} == {20}
        assert choice.HasField("finish")


async def test_a_reply_that_grows_too_large_ends_before_it_is_computed_whole() -> None:
    gate = threading.Semaphore(0)
    request = unary(stream_request(max_tokens=None, num_logprobs=20))
    async with Services(FakeRunner(model_info(), gate=gate)) as services:
        call = services.inference.Generate(request, metadata=at_most(2000))
        gate.release(100)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        gate.release(10_000)
        await services.wait_load(lambda load: load.num_used_blocks == 0, "its blocks are free")
        assert (await services.stream(stream_request())).token_ids == true_tokens(stream_request())
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "GenerateStream" in str(caught.value.details())


async def test_a_reply_is_as_large_as_its_client_takes_and_no_larger() -> None:
    """Text counts towards the limit, although its size is known only at the end."""
    request = unary(stream_request(max_tokens=None, request_id="mine"))
    async with Services(FakeRunner(model_info(max_model_len=400))) as services:
        size = (await services.inference.Generate(request)).ByteSize()
        assert (await services.inference.Generate(request, metadata=at_most(size))).ByteSize() == size
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.inference.Generate(request, metadata=at_most(size - 1))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("value", ["", "many", "-1", "1e9", "9" * 13])
async def test_a_limit_that_is_no_number_is_refused(value: str) -> None:
    async with Services() as services:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.inference.Generate(unary(stream_request()), metadata=at_most(value))
    assert list(violations(caught.value)) == [MAX_REPLY_BYTES_KEY]


class StalledStream:
    """A stream of which nothing is read. Log-probabilities soon fill its transport's window, which is small."""

    def __init__(self, services: Services, max_tokens: int = 1200) -> None:
        window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]
        options = [*window, ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(services.address, options)
        stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self.call = stub.GenerateStream(stream_request(max_tokens=max_tokens, num_logprobs=20))

    async def __aenter__(self) -> "StalledStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()


async def test_a_reader_that_is_too_far_behind_is_ended_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_request, "MAX_UNREAD_BYTES", 200 * (4 + 5 + 8 * 20))
    beside = stream_request([4, 5], max_tokens=1000)
    async with Services() as services, StalledStream(services, max_tokens=1000) as stalled:
        assert (await services.stream(beside)).token_ids == true_tokens(beside)
        await services.wait_load(lambda load: load.num_used_blocks == 0, "its blocks are free")
        assert (await services.load()).num_output_tokens < 2000
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_stream(stalled.call)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "behind" in str(caught.value.details())


async def test_of_all_that_is_unread_the_most_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_end, "MAX_UNREAD_BYTES", 180_000)
    monkeypatch.setattr(front_end, "COUNT_EVERY_BYTES", 10_000)
    async with Services() as services, StalledStream(services, 200) as less, StalledStream(services, 1400) as more:
        await services.wait_load(lambda load: load.num_used_blocks == 0 and load.num_output_tokens > 800, "both ended")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_stream(more.call)
        output = await read_stream(less.call)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert output.token_ids == true_tokens(stream_request(max_tokens=200))


async def test_a_reader_that_is_far_behind_gets_messages_of_a_bounded_size() -> None:
    async with Services() as services, StalledStream(services) as stalled:
        await services.wait_load(lambda load: load.num_output_tokens >= 1200, "all tokens are there")
        output = await read_stream(stalled.call)
    assert output.token_ids == true_tokens(stream_request(max_tokens=1200))
    lengths = [len(message.token_ids) for message in output.messages]
    assert 10 < max(lengths) <= live_request.MAX_TOKENS_PER_DELTA
    assert all(len(message.logprobs) == len(message.token_ids) for message in output.messages)
    assert output.usage.num_output_tokens == 1200
