"""Two front-end processes beside one step loop: clients can't tell them from one, whichever they land on."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from tokenizers import Tokenizer

from tandem.v1 import control_pb2, inference_pb2
from tandem_scheduler.engine.recorder import replay
from tandem_scheduler.front_end.live_request import MAX_TOKENS_PER_DELTA
from tandem_scheduler.service import SchedulerService, default_num_front_ends
from tandem_shared.config import SchedulerSettings
from tandem_shared.errors import ConfigError
from tandem_shared.model_folder import TOKENIZER_FILES, resolve_model
from tests.contract.front_ends import Connection, connect, front_end_processes, two_front_ends
from tests.contract.services import (
    CONTROL,
    HOST,
    INFERENCE,
    MODEL,
    Services,
    details,
    model_info,
    retry_delay_s,
    stream_request,
    true_tokens,
    wait_until,
)
from tests.contract.test_inference import spanning_stop
from tests.contract.test_worker_loss import gated_runner, kill_worker, open_gate
from tests.support.fake_worker import FakeRunner

STOP = inference_pb2.FINISH_REASON_STOP
MANY = 100_000


def gated_services(**settings: Any) -> Services:
    """Two front ends, and a worker that gives no result until its gate is opened."""
    return Services(gated_runner(0), api_server_count=2, **settings)


@asynccontextmanager
async def running_on(
    services: Services, connection: Connection, request: inference_pb2.GenerateStreamRequest
) -> AsyncIterator["asyncio.Task[Any]"]:
    """The request's stream, once it runs."""
    before = (await services.load()).num_running_sequences
    task = asyncio.create_task(connection.stream(request))
    await services.wait_load(lambda load: load.num_running_sequences > before, "it runs")
    yield task
    await asyncio.gather(task, return_exceptions=True)


async def error_of(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def varied_requests() -> list[inference_pb2.GenerateStreamRequest]:
    return [
        stream_request("What light through yonder window breaks?", 60, request_id="text"),
        stream_request([5] * 40, 12, temperature=1.0, seed=7, num_choices=5, request_id="choices"),
        stream_request(temperature=0.7, num_logprobs=3, request_id="logprobs"),
        stream_request(num_logprobs=0, max_tokens=30, ignore_eos=None, request_id="eos"),
        stream_request(max_tokens=300, stop_strings=["th", "e "], num_logprobs=1, request_id="stop"),
        stream_request(temperature=None, max_tokens=40, priority=-3, cache_salt="salt", request_id="defaults"),
    ]


async def test_outputs_are_those_of_one_process_and_the_recording_replays(tmp_path: Path) -> None:
    eos = true_tokens(stream_request(max_tokens=30))[6]
    info = model_info(eos_token_ids=(eos,), default_temperature=0.0)
    requests = varied_requests()
    async with Services(FakeRunner(info), enable_prefix_caching=False) as services:
        expected = [await services.generate(request) for request in requests]
    record = tmp_path / "schedule"
    services = Services(FakeRunner(info), enable_prefix_caching=False, api_server_count=2, record=str(record))
    async with two_front_ends(services) as connections:
        for connection in connections:
            assert await asyncio.gather(*map(connection.generate, requests)) == expected
            streams = await asyncio.gather(*map(connection.stream, requests))
            for stream, unary in zip(streams, expected, strict=True):
                assert stream.usage == unary.usage
                for choice in unary.choices:
                    streamed = stream.choices[choice.choice_index]
                    assert (streamed.text, streamed.token_ids) == (choice.text, list(choice.token_ids))
                    assert (streamed.logprobs, streamed.finish) == (list(choice.logprobs), choice.finish)
        load = await services.load()
        assert load.num_used_blocks == load.num_running_sequences == 0
    assert load.num_output_tokens == 4 * sum(unary.usage.num_output_tokens for unary in expected)
    verdict = replay(record)
    assert verdict.difference is None and verdict.num_plans > 0


async def test_many_streams_over_both_are_each_the_truth_and_see_the_shared_prefix_cache() -> None:
    requests = [
        stream_request(range(1, 20 + 7 * (index // 2)), 30 + index, temperature=float(index % 2), seed=index)
        for index in range(24)
    ]
    async with two_front_ends(Services(api_server_count=2, max_num_seqs=7, max_num_batched_tokens=64)) as connections:
        calls = [connections[index % 2].stream(request) for index, request in enumerate(requests)]
        outputs = await asyncio.gather(*calls)
        again = await connections[1].stream(requests[0])
    assert [output.token_ids for output in outputs] == [true_tokens(request) for request in requests]
    assert again.usage.num_cached_tokens == 16


async def test_a_request_id_is_live_on_all() -> None:
    request = stream_request(request_id="mine")
    services = gated_services()
    async with two_front_ends(services) as (first, second), running_on(services, first, request) as task:
        for connection in (first, second):
            assert (await error_of(connection.stream(request))).code() == grpc.StatusCode.ALREADY_EXISTS
        open_gate(services.runner)
        assert (await task).token_ids == true_tokens(request)
        # Free on all as soon as its end is seen on one.
        for connection in (second, first) * 5:
            assert (await connection.generate(request)).usage.num_output_tokens == 8


async def test_abort_reaches_a_request_of_another() -> None:
    request = stream_request([1] * 40, 400, num_choices=2, request_id="long")
    services = gated_services()
    async with two_front_ends(services) as (first, second), running_on(services, first, request) as task:
        open_gate(services.runner, 4)
        await services.wait_load(lambda load: load.num_output_tokens >= 4, "some tokens")
        await second.control.Abort(control_pb2.AbortRequest(request_id="long"))
        output = await task
        assert (await services.load()).num_used_blocks == 0
        for connection in (first, second):
            error = await error_of(connection.control.Abort(control_pb2.AbortRequest(request_id="long")))
            assert error.code() == grpc.StatusCode.NOT_FOUND
    for index, choice in output.choices.items():
        assert choice.finish == inference_pb2.Finish(reason=inference_pb2.FINISH_REASON_ABORT)
        assert choice.token_ids == true_tokens(request, choice_index=index)[: len(choice.token_ids)]
    assert output.usage.num_output_tokens == sum(len(choice.token_ids) for choice in output.choices.values())


async def test_drain_refuses_on_all_and_waits_for_all() -> None:
    services = gated_services()
    async with two_front_ends(services) as (first, second), running_on(services, first, stream_request()) as task:
        error = await error_of(second.control.Drain(control_pb2.DrainRequest(), timeout=0.1))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        drained = asyncio.ensure_future(second.control.Drain(control_pb2.DrainRequest()))
        for connection in (first, second):
            error = await error_of(connection.stream(stream_request()))
            assert error.code() == grpc.StatusCode.UNAVAILABLE and retry_delay_s(error) > 0
            await connection.wait_health("NOT_SERVING")
            assert [await connection.health_of(name) for name in ("", CONTROL)] == ["SERVING"] * 2
            assert (await connection.control.GetServerInfo(control_pb2.GetServerInfoRequest())).draining
        assert not drained.done()
        open_gate(services.runner)
        assert (await task).token_ids == true_tokens(stream_request())
        await drained


async def test_the_rest_of_control_is_one_answer() -> None:
    services = Services(api_server_count=2)
    async with two_front_ends(services) as (first, second):
        await first.stream(stream_request([3] * 64))
        reset = await second.control.ResetPrefixCache(control_pb2.ResetPrefixCacheRequest())
        assert reset.num_forgotten_blocks >= 4
        assert (await first.stream(stream_request([3] * 64))).usage.num_cached_tokens == 0
        assert await first.load() == await second.load()
        infos = [await each.control.GetServerInfo(control_pb2.GetServerInfoRequest()) for each in (first, second)]
        assert len({(info.version, info.worker_state, info.draining) for info in infos}) == 1
        models = [await each.inference.GetModelInfo(inference_pb2.GetModelInfoRequest()) for each in (first, second)]
        assert models[0] == models[1] and models[0].fingerprint == "fake-model"


BadCall = Callable[[Any], Awaitable[Any]]
"""Takes Services or a Connection: both have the stubs."""

BAD_CALLS: dict[str, BadCall] = {
    "many fields": lambda c: c.generate(stream_request([], 0, temperature=-1.0, top_p=2.0, num_choices=99)),
    "too long": lambda c: c.stream(stream_request([1] * 4096)),
    "more than all blocks": lambda c: c.stream(stream_request([1] * 300, 10)),
    "another model": lambda c: c.stream(stream_request(model="x" * 3000)),
    "full queue": lambda c: c.generate(stream_request(num_choices=8, request_id="eight")),
    "more than the queue": lambda c: c.generate(stream_request(num_choices=9, request_id="nine")),
    "id in use": lambda c: c.stream(stream_request(request_id="ü" * 120)),
    "nothing to abort": lambda c: c.control.Abort(control_pb2.AbortRequest(request_id="ü" * 120 + "?")),
    "token past the vocabulary": lambda c: c.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[5000])),
}


async def statuses(services: Services, connection: Any) -> dict[str, tuple[grpc.StatusCode, str, status_pb2.Status]]:
    """How bad calls end while a request holds its id, another waits, and a queue of 8 is not full yet."""
    holding = asyncio.create_task(services.stream(stream_request(request_id="ü" * 120)))
    await services.wait_load(lambda load: load.num_running_sequences == 1, "one runs")
    waiting = asyncio.create_task(services.stream(stream_request()))
    await services.wait_load(lambda load: load.num_waiting_sequences == 1, "one waits")
    errors = {name: await error_of(call(connection)) for name, call in BAD_CALLS.items()}
    open_gate(services.runner)
    await asyncio.gather(holding, waiting)
    return {name: (error.code(), str(error.details()), details(error)) for name, error in errors.items()}


async def test_errors_are_those_of_one_process() -> None:
    def runner() -> FakeRunner:
        # A context that the blocks can't hold: the core, not the front end, refuses what never fits.
        return gated_runner(0, num_blocks=17)

    async with Services(runner(), max_num_waiting=8) as services:
        expected = await statuses(services, services)
    services = Services(runner(), max_num_waiting=8, api_server_count=2)
    async with two_front_ends(services) as (_, second):
        assert await statuses(services, second) == expected
    codes = {name: code.name for name, (code, _, _) in expected.items()}
    assert codes["full queue"] == "RESOURCE_EXHAUSTED" and codes["id in use"] == "ALREADY_EXISTS"
    assert codes["nothing to abort"] == "NOT_FOUND"
    others = codes.keys() - {"full queue", "id in use", "nothing to abort"}
    assert {codes[name] for name in others} == {"INVALID_ARGUMENT"}


async def test_a_frozen_front_end_slows_nobody_and_a_stop_found_late_counts_nothing_past_it() -> None:
    tokenizer = Tokenizer.from_file(str(resolve_model(MODEL, TOKENIZER_FILES) / "tokenizer.json"))
    truth = true_tokens(stream_request(max_tokens=200))
    text, stop, num_tokens = spanning_stop(tokenizer, truth)
    request = stream_request(max_tokens=200, stop_strings=[stop], num_logprobs=2)
    services = gated_services()
    async with two_front_ends(services) as (first, second), running_on(services, first, request) as task:
        first.process.send_signal(signal.SIGSTOP)
        # The rest is asked of the other one: this one answers nobody.
        open_gate(services.runner)
        assert (await second.stream(stream_request([4, 5], 100))).usage.num_output_tokens == 100

        async def has_ended() -> bool:
            return (await second.load()).num_running_sequences == 0

        await wait_until(has_ended, "the core has ended it, by length")
        first.process.send_signal(signal.SIGCONT)
        output = await task

        async def is_counted() -> bool:
            return (await second.load()).num_output_tokens == 100 + num_tokens

        await wait_until(is_counted, "tokens past the stop count nowhere")
        assert (await second.load()).num_overshoot_tokens == 200 - num_tokens
    [choice] = output.choices.values()
    assert (choice.text, choice.token_ids) == (text, truth[:num_tokens])
    assert len(choice.logprobs) == output.usage.num_output_tokens == num_tokens
    assert choice.finish == inference_pb2.Finish(reason=STOP, stop_string=stop)


async def test_steps_that_a_frozen_front_end_misses_reach_it_merged() -> None:
    # Log-probabilities fill the socket; from then on the scheduler process gathers.
    request = stream_request(max_tokens=2000, num_logprobs=20)
    services = gated_services()
    async with two_front_ends(services) as (first, second), running_on(services, first, request) as task:
        first.process.send_signal(signal.SIGSTOP)
        open_gate(services.runner)

        async def has_ended() -> bool:
            return (await second.load()).num_running_sequences == 0

        await wait_until(has_ended, "the core has ended it")
        first.process.send_signal(signal.SIGCONT)
        output = await task
    assert output.token_ids == true_tokens(request)
    assert len(output.choices[0].logprobs) == 2000
    assert max(len(message.token_ids) for message in output.messages) == MAX_TOKENS_PER_DELTA


@pytest.mark.parametrize("ending", ["cancelled", "deadline"])
async def test_a_call_that_goes_away_leaves_nothing_behind(ending: str) -> None:
    request = stream_request([1] * 100, 500, num_choices=3, request_id="mine")
    services = gated_services()
    async with two_front_ends(services) as (first, second):
        call = first.inference.GenerateStream(request, timeout=0.5 if ending == "deadline" else None)
        await services.wait_load(lambda load: load.num_used_blocks > 0, "it runs")
        if ending == "cancelled":
            call.cancel()
        await services.wait_load(lambda load: load.num_used_blocks == 0, "its blocks are free")
        open_gate(services.runner)
        again = stream_request([1] * 100, 5, request_id="mine")
        assert (await second.stream(again)).token_ids == true_tokens(again)


async def test_a_killed_front_end_loses_its_own_requests_alone_and_is_replaced() -> None:
    requests = [stream_request([number] * 100, 60, request_id=f"r{number}") for number in range(4)]
    services = gated_services()
    async with two_front_ends(services) as (first, second):
        tasks = [
            asyncio.create_task((first if number % 2 else second).stream(request))
            for number, request in enumerate(requests)
        ]
        await services.wait_load(lambda load: load.num_running_sequences + load.num_waiting_sequences == 4, "all came")
        open_gate(services.runner, 5)
        first.process.kill()

        async def are_gone() -> bool:
            load = await second.load()
            return load.num_running_sequences + load.num_waiting_sequences == 2

        await wait_until(are_gone, "its sequences are gone")
        # 60 tokens after 100 take 10 blocks each.
        assert (await second.load()).num_used_blocks <= 20
        for task in tasks[1::2]:
            assert (await error_of(task)).code() == grpc.StatusCode.UNAVAILABLE
        open_gate(services.runner)
        for task, request in zip(tasks[::2], requests[::2], strict=True):
            assert (await task).token_ids == true_tokens(request)

        async def is_replaced() -> bool:
            return len(front_end_processes()) == 2 and (await reach_a_third(services, [first, second]))

        await wait_until(is_replaced, "a new front end takes calls")
        # The dead one's request ids are free.
        assert (await second.stream(requests[1])).token_ids == true_tokens(requests[1])
        assert (await second.load()).num_used_blocks == 0


async def reach_a_third(services: Services, known: list[Connection]) -> bool:
    """Whether one more connection lands in another front end and is served there."""
    connection = await connect(services.address)
    async with connection.channel:
        if connection.process in [each.process for each in known]:
            return False
        await connection.wait_health("SERVING")
        return (await connection.generate(stream_request())).usage.num_output_tokens == 8


async def test_streams_on_both_survive_a_lost_worker() -> None:
    requests = [stream_request(range(1, 30 + number), 40, temperature=float(number % 2)) for number in range(6)]
    for number, request in enumerate(requests):
        request.request_id = f"r{number}"
    services = gated_services()
    async with two_front_ends(services) as (first, second):
        tasks = [asyncio.create_task((first, second)[n % 2].stream(request)) for n, request in enumerate(requests)]
        await services.wait_load(lambda load: load.num_running_sequences + load.num_waiting_sequences == 6, "all came")
        open_gate(services.runner, 10)
        await services.wait_load(lambda load: load.num_output_tokens >= 12, "some tokens")
        await kill_worker(services)
        for connection in (first, second):
            await connection.wait_health("NOT_SERVING")
            assert await connection.health_of("") == "SERVING"
        assert not any(task.done() for task in tasks)
        await services.start_worker(gated_runner(1, MANY))
        for task, request in zip(tasks, requests, strict=True):
            assert (await task).token_ids == true_tokens(request)
        for connection in (first, second):
            await connection.wait_health("SERVING")


async def test_stopping_finishes_what_runs_within_the_grace_and_ends_what_outlasts_it() -> None:
    services = gated_services()
    async with two_front_ends(services) as (first, second):
        short, endless = (
            asyncio.create_task(each.stream(stream_request([n] * 5, 4 + 4000 * n)))
            for n, each in enumerate((first, second))
        )
        await services.wait_load(lambda load: load.num_running_sequences + load.num_waiting_sequences == 2, "two came")
        stopping = asyncio.create_task(services.service.stop(grace_s=1.0))
        open_gate(services.runner, 50)
        assert len((await short).token_ids) == 4
        error = await error_of(endless)
        assert error.code() == grpc.StatusCode.UNAVAILABLE and retry_delay_s(error) > 0
        await stopping
        assert front_end_processes() == []


async def test_before_a_worker_is_seen() -> None:
    services = Services(api_server_count=2)
    await services.start(has_worker=False)
    try:
        assert [await services.health_of(name) for name in ("", CONTROL, INFERENCE)] == [
            "SERVING",
            "SERVING",
            "NOT_SERVING",
        ]
        calls = [
            services.inference.GetModelInfo(inference_pb2.GetModelInfoRequest()),
            services.stream(stream_request()),
        ]
        for call in calls:
            error = await error_of(call)
            assert error.code() == grpc.StatusCode.UNAVAILABLE and retry_delay_s(error) > 0
        await services.start_worker()
        await services.wait_health("SERVING")
        assert (await services.stream(stream_request())).token_ids == true_tokens(stream_request())
    finally:
        await services.stop()


@pytest.mark.parametrize("is_shared", [False, True])
async def test_a_port_in_use_is_an_error_even_if_its_owner_would_share(is_shared: bool) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(is_shared))
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        service = SchedulerService(SchedulerSettings(port=port, worker_address=f"{HOST}:1", api_server_count=2))
        with pytest.raises(ConfigError, match=f"can't listen on {HOST}:{port}"):
            await service.start()
    assert front_end_processes() == []


async def test_a_front_end_that_cannot_start_is_an_error_and_leaves_none(tmp_path: Path) -> None:
    settings = SchedulerSettings(port=0, tokenizer=str(tmp_path), worker_address=f"{HOST}:1", api_server_count=2)
    with pytest.raises(ConfigError, match="a front-end process ended with status 2 before it listened"):
        await SchedulerService(settings).start()
    assert front_end_processes() == []


def test_interceptors_need_the_front_end_in_their_own_process() -> None:
    class Interceptor(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            return await continuation(handler_call_details)

    async def create() -> None:
        settings = SchedulerSettings(worker_address=f"{HOST}:1", api_server_count=1)
        with pytest.raises(ConfigError, match="interceptors"):
            SchedulerService(settings, interceptors=[Interceptor()])

    asyncio.run(create())


@pytest.mark.parametrize(("num_cpus", "count"), [(1, 0), (7, 0), (8, 2), (12, 3), (16, 4), (128, 4)])
def test_the_default_is_a_quarter_of_the_cpus_within_reason(
    monkeypatch: pytest.MonkeyPatch, num_cpus: int, count: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(num_cpus)))
    assert default_num_front_ends() == count
