"""TandemClient against real services: replies, streams, errors as Tandem's own classes."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import grpc
import pytest

from tandem.client import TandemClient
from tandem.sampling_params import SamplingParams
from tandem.v1 import control_pb2, inference_pb2
from tandem_shared.errors import Draining, InvalidRequest, RequestIdInUse, RequestNotFound
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import SamplingLists
from tandem_shared.step_plan import NewRow, StepPlan
from tests.contract.services import MODEL, Services, model_info
from tests.support.fake_worker import FakePendingStep, FakeRunner
from tests.support.tokenizers import embedded

T = TypeVar("T")


@pytest.fixture
async def services() -> AsyncIterator[Services]:
    async with Services() as services:
        yield services


async def call(services: Services, use: Callable[[TandemClient], T]) -> T:
    """Calls the synchronous client in a thread, as the services run in this event loop."""

    def in_thread() -> T:
        with TandemClient(services.address, max_retries=0) as client:
            return use(client)

    return await asyncio.to_thread(in_thread)


async def test_generate_is_the_joined_stream(services: Services) -> None:
    params = SamplingParams(seed=3, max_tokens=20, n=2, logprobs=2, ignore_eos=True)
    whole = await call(services, lambda client: client.generate("ROMEO:", params))
    deltas = await call(services, lambda client: list(client.generate_stream("ROMEO:", params)))
    for choice in whole.choices:
        mine = [delta for delta in deltas if delta.choice_index == choice.choice_index]
        assert "".join(delta.text_delta for delta in mine) == choice.text
        assert [token_id for delta in mine for token_id in delta.token_ids] == list(choice.token_ids)
        assert len(choice.token_ids) == len(choice.logprobs) == 20
        assert mine[-1].finish.reason == choice.finish.reason == inference_pb2.FINISH_REASON_LENGTH
    assert whole.choices[0].token_ids != whole.choices[1].token_ids
    assert deltas[-1].usage == whole.usage


class RememberingRunner(FakeRunner):
    """Keeps the rows that it is given."""

    def reset(self) -> None:
        super().reset()
        self.added: list[NewRow] = []

    def execute(self, plan: StepPlan) -> FakePendingStep:
        self.added += plan.added_rows
        return super().execute(plan)


@pytest.mark.parametrize("num_front_ends", [0, 1])
async def test_everything_that_a_client_asks_of_sampling_reaches_the_worker(num_front_ends: int) -> None:
    params = SamplingParams(
        temperature=0.5,
        top_k=-1,
        top_p=0.75,
        min_p=0.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        seed=2**64 - 1,
        logit_bias={"7": -1.5, 9: 100},
        bad_words=["the"],
        allowed_token_ids=[9, 5],
        min_tokens=2,
        max_tokens=3,
        stop_token_ids=[40],
        logprobs=2,
        prompt_logprobs=1,
        logprob_token_ids=[8, 2],
    )
    runner = RememberingRunner(model_info(eos_token_ids=(1017,)))
    async with Services(runner, api_server_count=num_front_ends) as services:
        reply = await call(services, lambda client: client.generate([1, 2, 3], params))
    [row] = runner.added
    assert row.sampling == RowSampling(
        temperature=0.5,
        top_p=0.75,
        min_p=0.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        seed=2**64 - 1,
        min_tokens=2,
        num_logprobs=2,
        num_prompt_logprobs=1,
    )
    assert row.lists == SamplingLists(
        stop_token_ids=(40, 1017),
        logit_bias=((7, -1.5), (9, 100.0)),
        allowed_token_ids=(5, 9),
        bad_words=tuple(tuple(embedded().encode(text).ids) for text in ("the", " the")),
        logprob_token_ids=(8, 2),
    )
    assert [report.token_id for report in reply.prompt_logprobs] == [2, 3]
    for report in reply.choices[0].logprobs:
        assert [each.token_id for each in report.requested] == [8, 2] and report.token_bytes


async def test_text_and_its_token_ids_are_the_same_prompt(services: Services) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5)
    token_ids = await call(services, lambda client: client.tokenize("JULIET:\nO"))
    assert await call(services, lambda client: client.detokenize(token_ids)) == "JULIET:\nO"
    by_text = await call(services, lambda client: client.generate("JULIET:\nO", params))
    by_ids = await call(services, lambda client: client.generate(token_ids, params))
    assert by_text.choices == by_ids.choices


async def test_closing_a_stream_aborts_its_request(services: Services) -> None:
    def read_two(client: TandemClient) -> None:
        stream = client.generate_stream("x", SamplingParams(max_tokens=1000, ignore_eos=True))
        next(stream), next(stream)
        stream.close()

    services.runner.delay_s = 0.002
    await call(services, read_two)
    await services.wait_load(lambda load: load.num_running_sequences == 0, "the request has gone")
    assert (await services.load()).num_output_tokens < 1000


async def test_what_the_server_refuses_is_an_error_of_tandem(services: Services) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await call(services, lambda client: client.generate("x", SamplingParams(n=65, max_tokens=10**6)))
    assert {violation.field for violation in caught.value.violations} == {"num_choices", "stopping.max_tokens"}
    with pytest.raises(InvalidRequest, match="empty"):
        await call(services, lambda client: list(client.generate_stream("")))
    with pytest.raises(RequestNotFound, match="'gone'"):
        await call(services, lambda client: client.abort("gone"))
    await call(services, lambda client: client.drain(timeout_s=10))
    with pytest.raises(Draining) as draining:
        await call(services, lambda client: client.generate("x"))
    assert draining.value.retry_after_s > 0


async def test_a_live_request_id_is_refused_and_can_be_aborted(services: Services) -> None:
    services.runner.delay_s = 0.002
    started = threading.Event()

    def read_all(client: TandemClient) -> inference_pb2.Finish:
        params = SamplingParams(max_tokens=4000, ignore_eos=True)
        finish = inference_pb2.Finish()
        for delta in client.generate_stream("x", params, request_id="mine"):
            started.set()
            finish = delta.finish
        return finish

    def use_again_and_abort(client: TandemClient) -> None:
        started.wait(10)
        with pytest.raises(RequestIdInUse):
            client.generate("y", request_id="mine")
        client.abort("mine")

    finish, _ = await asyncio.gather(call(services, read_all), call(services, use_again_and_abort))
    assert finish.reason == inference_pb2.FINISH_REASON_ABORT


async def test_a_deadline_is_the_transports_error(services: Services) -> None:
    services.runner.delay_s = 0.05
    with pytest.raises(grpc.RpcError) as caught:
        await call(services, lambda c: c.generate("x", SamplingParams(max_tokens=1000, ignore_eos=True), timeout_s=0.2))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_what_an_operator_asks(services: Services) -> None:
    await call(services, lambda client: client.generate("a" * 200, SamplingParams(max_tokens=2)))
    assert (await call(services, lambda client: client.server_info())).worker_state == control_pb2.WORKER_STATE_READY
    assert (await call(services, lambda client: client.model_info())).model == MODEL
    load = await call(services, lambda client: client.load())
    assert load.num_cached_blocks > 0
    assert await call(services, lambda client: client.reset_prefix_cache()) == load.num_cached_blocks


async def test_a_server_whose_handshake_takes_long_is_reached(services: Services) -> None:
    """As with a distant server over TLS. gRPC's option for the time limit of an attempt is named after the backoff."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2.5)
        there, back = await asyncio.open_connection(*services.address.split(":"))
        await asyncio.gather(forward(reader, back), forward(there, writer), return_exceptions=True)

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

        def load() -> control_pb2.GetLoadResponse:
            with TandemClient(address) as client:
                return client.load()

        assert (await asyncio.to_thread(load)).num_total_blocks
