"""Two front-end processes beside one step loop: clients can't tell them from one, whichever they land on."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from google.rpc import status_pb2

from tandem.v1 import control_pb2, inference_pb2
from tandem_scheduler.engine.recorder import replay
from tests.contract.front_ends import (
    gated_services,
    running_on,
    two_front_ends,
)
from tests.contract.gated_worker import MANY, gated_runner, kill_worker, open_gate
from tests.contract.services import (
    CONTROL,
    Services,
    details,
    error_of,
    model_info,
    retry_delay_s,
    stream_request,
    true_tokens,
)
from tests.support.fake_worker import FakeRunner


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
    info = model_info(eos_token_ids=(eos,), sampling_defaults={"temperature": 0.0})
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
        # The id is free on all front ends as soon as the end is seen on one.
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
"""A call on Services or on a Connection, as both have the stubs."""

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
        # The blocks can't hold the whole context, so the core, and not the front end, refuses what never fits.
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
