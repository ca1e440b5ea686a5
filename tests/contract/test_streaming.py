"""Readers of streams that go away or are slow, and what that means for others."""

import asyncio
import threading

import grpc
import pytest

from tandem.v1 import inference_pb2_grpc
from tests.contract.services import Services, StreamedOutput, model_info, read_stream, stream_request, true_tokens
from tests.support.fake_worker import FakeRunner


async def test_a_reader_that_keeps_up_gets_one_token_a_message() -> None:
    gate = threading.Semaphore(0)
    request = stream_request(max_tokens=10)
    async with Services(FakeRunner(model_info(), gate=gate)) as services:
        output = StreamedOutput()
        task = asyncio.create_task(read_stream(services.inference.GenerateStream(request), output))
        for count in range(1, 11):
            gate.release()
            while len(output.token_ids) < count:
                await asyncio.sleep(0.001)
        await task
    assert [len(message.token_ids) for message in output.messages] == [1] * 10
    assert output.token_ids == true_tokens(request)


async def test_a_slow_reader_gets_several_tokens_a_message_and_holds_up_nobody() -> None:
    # Log-probabilities make messages large, so that the transport's window, kept small, fills while the reader sleeps.
    slow_request = stream_request(max_tokens=2000, num_logprobs=20)
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]
    fast_request = stream_request([4, 5], max_tokens=200)
    async with Services() as services, grpc.aio.insecure_channel(services.address, small_window) as channel:
        messages = aiter(inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(slow_request))
        output = StreamedOutput()
        output.add(await anext(messages))
        # The other one runs, and so does the slow reader's own sequence, to their ends.
        fast = await services.stream(fast_request)
        await services.wait_load(lambda load: load.num_running_sequences == 0, "the slow reader's sequence has ended")
        await read_stream(messages, output)
    assert fast.token_ids == true_tokens(fast_request)
    assert output.token_ids == true_tokens(slow_request)
    assert max(len(message.token_ids) for message in output.messages) > 10
    assert len(output.choices[0].logprobs) == 2000


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("unary", [False, True])
async def test_a_cancelled_call_leaves_nothing_behind(num_choices: int, unary: bool) -> None:
    gate = threading.Semaphore(0)
    request = stream_request([1] * 100, 500, num_choices=num_choices, request_id="mine")
    async with Services(FakeRunner(model_info(), gate=gate)) as services:
        task = asyncio.create_task(services.generate(request) if unary else services.stream(request))
        gate.release(5)
        await services.wait_load(lambda load: load.num_output_tokens >= 3, "some tokens")
        assert (await services.load()).num_used_blocks > 0
        task.cancel()
        # The plans in flight have no result yet: the blocks are free before any comes.
        await services.wait_load(lambda load: load.num_used_blocks == 0, "its blocks are free")
        load = await services.load()
        assert load.num_running_sequences == load.num_waiting_sequences == 0
        gate.release(10_000)
        again = stream_request([1] * 100, 5, request_id="mine")
        assert (await services.stream(again)).token_ids == true_tokens(again)


async def test_a_passed_deadline_leaves_nothing_behind() -> None:
    gate = threading.Semaphore(0)
    async with Services(FakeRunner(model_info(), gate=gate)) as services:
        gate.release(3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_stream(services.inference.GenerateStream(stream_request([1] * 100, 500), timeout=0.2))
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await services.wait_load(lambda load: load.num_used_blocks == 0, "its blocks are free")
        assert (await services.load()).num_running_sequences == 0
        gate.release(10_000)
        assert (await services.stream(stream_request())).token_ids == true_tokens(stream_request())


async def test_a_waiting_request_that_is_cancelled_never_runs() -> None:
    gate = threading.Semaphore(0)
    runner = FakeRunner(model_info(), gate=gate)
    async with Services(runner, max_num_seqs=1) as services:
        running = asyncio.create_task(services.stream(stream_request()))
        await services.wait_load(lambda load: load.num_running_sequences == 1, "one runs")
        waiting = asyncio.create_task(services.stream(stream_request([7] * 50)))
        await services.wait_load(lambda load: load.num_waiting_sequences == 1, "one waits")
        waiting.cancel()
        await services.wait_load(lambda load: load.num_waiting_sequences == 0, "it is gone")
        gate.release(1000)
        assert (await running).token_ids == true_tokens(stream_request())
        assert (await services.load()).num_output_tokens == 8
