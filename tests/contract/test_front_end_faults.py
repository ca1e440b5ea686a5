"""Whatever goes wrong with one request's text ends that request; others, in the same batch, get all of theirs."""

import asyncio
import gc
import sys
import threading
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from tandem.v1 import control_pb2, inference_pb2
from tandem_scheduler.front_end.front_end import FrontEnd
from tandem_scheduler.front_end.grpc_api.inference_servicer import InferenceServicer
from tandem_scheduler.front_end.text.detokenizer import TextDecoder
from tandem_shared.errors import InvalidRequest, TextFailed
from tests.contract.services import Services, StreamedOutput, details, model_info, stream_request, true_tokens
from tests.support.fake_worker import FakeRunner
from tests.support.tokenizers import PanicException, WatchedTokenizer, embedded

GOOD = stream_request([4, 5, 6], 40)
BAD = stream_request([1, 2, 3], 40)
POISON = next(token for token in true_tokens(BAD)[5:] if token not in true_tokens(GOOD))
"""A token that occurs only in the output of the bad request."""


class PoisonedDecoder(TextDecoder):
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        if POISON in token_ids:
            raise PanicException("no text for this token")
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


def num_live(load: control_pb2.GetLoadResponse) -> int:
    return load.num_running_sequences + load.num_waiting_sequences


def front_end_of(services: Services) -> FrontEnd:
    front_end: Any = services.service._front_ends
    return front_end.front_end  # type: ignore[no-any-return]


# With stop strings text is made as tokens come, otherwise when they are taken, and for a unary request at the end.
@pytest.mark.parametrize("stop_strings", [[], ["never there"]], ids=["as it is taken", "as it comes"])
@pytest.mark.parametrize("unary", [False, True], ids=["streamed", "unary"])
async def test_a_detokenizer_that_raises_ends_one_request(unary: bool, stop_strings: list[str]) -> None:
    bad = stream_request([1, 2, 3], 40, stop_strings=stop_strings, num_choices=2, num_logprobs=1)
    good = stream_request([4, 5, 6], 40, stop_strings=stop_strings)
    gate = threading.Semaphore(0)
    async with Services(FakeRunner(model_info(), gate=gate)) as services:
        front_end_of(services).decoder = PoisonedDecoder(embedded())
        calls = [
            services.generate(bad) if unary else services.stream(bad),
            services.stream(good),
            services.stream(good),
        ]
        tasks = [asyncio.create_task(call) for call in calls]
        await services.wait_load(lambda load: num_live(load) == 4, "all are there")
        gate.release(10_000)
        failed, *outputs = await asyncio.gather(*tasks, return_exceptions=True)
        await services.wait_load(lambda load: load.num_used_blocks == 0, "the blocks of its choices are free")
        assert (await services.load()).num_worker_losses == 0
        assert (await services.stream(good)).token_ids == true_tokens(good)
    assert isinstance(failed, grpc.aio.AioRpcError) and failed.code() == grpc.StatusCode.INTERNAL
    assert "tokenizer" in str(failed.details()) or "output" in str(failed.details())
    assert details(failed).message == failed.details()
    for output in outputs:
        assert isinstance(output, StreamedOutput) and output.token_ids == true_tokens(good)
        assert output.choices[0].text == embedded().decode(true_tokens(good))


@pytest.mark.parametrize("text", ["words", "words " * 1000], ids=["short", "long"])
async def test_a_tokenizer_that_panics_gives_a_status_at_once(text: str) -> None:
    def panic(text: str) -> None:
        raise PanicException("at the disco")

    async with Services() as services:
        front_end_of(services).encoder._tokenizer = WatchedTokenizer(embedded(), panic)
        calls = [
            services.stream(stream_request(text)),
            services.generate(stream_request(text)),
            services.inference.Tokenize(inference_pb2.TokenizeRequest(text=text)),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(call, 10)
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            assert "at the disco" in str(caught.value.details())
        assert (await services.stream(stream_request())).token_ids == true_tokens(stream_request())


async def test_a_decoder_that_panics_gives_detokenize_a_status() -> None:
    async with Services() as services:
        front_end_of(services).decoder = PoisonedDecoder(embedded())
        for count in (1, 1000):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await services.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[POISON] * count))
            assert caught.value.code() == grpc.StatusCode.INTERNAL


class Call:
    """The part of a call's context that the servicer uses."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None


@pytest.mark.parametrize("fault", ["refused", "too many ids", "panic"])
async def test_a_request_that_failed_is_freed_without_the_garbage_collector(fault: str) -> None:
    request = inference_pb2.GenerateRequest.FromString(BAD.SerializeToString())
    if fault == "refused":
        request.sampling.top_p = 5.0
    elif fault == "too many ids":
        request.prompt.token_ids.ids.extend([1] * 5000)
    async with Services() as services:
        front_end = front_end_of(services)
        front_end.decoder = PoisonedDecoder(embedded())
        servicer: Any = InferenceServicer(front_end, "embedded")
        num_references = sys.getrefcount(request)
        gc.collect()
        gc.disable()
        try:
            with pytest.raises((InvalidRequest, TextFailed)) as caught:
                await servicer.Generate(request, Call())
            del caught
            assert sys.getrefcount(request) == num_references
        finally:
            gc.enable()
