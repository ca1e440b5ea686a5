"""AsyncTandemClient against real services. What it shares with TandemClient is tested there."""

import asyncio
import inspect
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest

from tandem import (
    AsyncTandemClient,
    InvalidRequest,
    RequestNotFound,
    SamplingParams,
    TandemClient,
)
from tandem.v1 import control_pb2, inference_pb2
from tests.contract.services import MODEL, Services


@pytest.fixture
async def services() -> AsyncIterator[Services]:
    async with Services() as services:
        yield services


@pytest.fixture
async def client(services: Services) -> AsyncIterator[AsyncTandemClient]:
    async with AsyncTandemClient(services.address) as client:
        yield client


def test_both_clients_have_the_same_methods() -> None:
    for name, method in inspect.getmembers(TandemClient, inspect.isfunction):
        if not name.startswith("_") or name == "__init__":
            there = inspect.signature(getattr(AsyncTandemClient, name)).parameters
            assert dict(inspect.signature(method).parameters) == dict(there), name


async def test_generate_is_the_joined_stream(client: AsyncTandemClient) -> None:
    params = SamplingParams(seed=3, max_tokens=20, n=2, logprobs=2, ignore_eos=True)
    whole = await client.generate("ROMEO:", params)
    deltas = [delta async for delta in client.generate_stream("ROMEO:", params)]
    for choice in whole.choices:
        mine = [delta for delta in deltas if delta.choice_index == choice.choice_index]
        assert "".join(delta.text_delta for delta in mine) == choice.text
        assert [token_id for delta in mine for token_id in delta.token_ids] == list(choice.token_ids)
    assert deltas[-1].usage == whole.usage


async def test_many_calls_at_once_each_get_their_own_answer(client: AsyncTandemClient) -> None:
    params = [SamplingParams(seed=number, max_tokens=5, ignore_eos=True) for number in range(40)]
    at_once = await asyncio.gather(*(client.generate([1, 2, 3], each) for each in params))
    one_by_one = [await client.generate(np.array([1, 2, 3]), each) for each in params]
    assert [reply.choices for reply in at_once] == [reply.choices for reply in one_by_one]
    assert len({tuple(reply.choices[0].token_ids) for reply in at_once}) > 30


async def test_text_and_operators_calls(client: AsyncTandemClient) -> None:
    ids = await client.tokenize("JULIET:\nO")
    assert await client.detokenize(np.array(ids)) == "JULIET:\nO"
    assert (await client.model_info()).model == MODEL
    assert (await client.server_info()).worker_state == control_pb2.WORKER_STATE_READY
    await client.generate("a" * 200, SamplingParams(max_tokens=2))
    num_cached = (await client.load()).num_cached_blocks
    assert await client.reset_prefix_cache() == num_cached > 0
    with pytest.raises(RequestNotFound):
        await client.abort("gone")
    await client.drain(timeout_s=10)


async def test_errors_are_those_of_tandem_and_name_the_field(client: AsyncTandemClient) -> None:
    with pytest.raises(InvalidRequest, match=r"stopping\.max_tokens"):
        await client.generate("x", SamplingParams(max_tokens=10**6))
    for call in (client.tokenize("\ud800"), client.detokenize([-1]), client.generate("x", priority=2**40)):
        with pytest.raises(InvalidRequest):
            await call


async def test_a_cancelled_task_and_a_closed_stream_abort_their_requests(
    services: Services, client: AsyncTandemClient
) -> None:
    services.runner.delay_s = 0.002
    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    task = asyncio.create_task(client.generate("x", params))
    stream = client.generate_stream("y", params)
    assert isinstance(await anext(stream), inference_pb2.GenerateStreamResponse)
    await services.wait_load(lambda load: load.num_running_sequences == 2, "both run")
    task.cancel()
    await stream.aclose()
    with pytest.raises(asyncio.CancelledError):
        await task
    await services.wait_load(lambda load: load.num_running_sequences == 0, "both have gone")


async def test_a_deadline_is_the_transports_error(services: Services, client: AsyncTandemClient) -> None:
    services.runner.delay_s = 0.05
    with pytest.raises(grpc.RpcError) as caught:
        await client.generate("x", SamplingParams(max_tokens=1000, ignore_eos=True), timeout_s=0.2)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
