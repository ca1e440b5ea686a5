"""ControlService and health over real gRPC, and the service's own start and end."""

import asyncio
import dataclasses
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from tandem.v1 import control_pb2, inference_pb2
from tandem_shared import VERSION
from tandem_shared.step_codec import PROTOCOL_VERSION
from tandem_shared.step_plan import StepPlan, StepResult, StepTimes
from tests.contract.services import (
    CONTROL,
    INFERENCE,
    MODEL,
    VOCAB_SIZE,
    Services,
    model_info,
    retry_delay_s,
    stream_request,
    true_tokens,
)
from tests.support.fake_worker import FakeRunner

ABORT = inference_pb2.FINISH_REASON_ABORT


async def test_server_and_model_info() -> None:
    async with Services(FakeRunner(model_info(eos_token_ids=(0, 7)))) as services:
        server = await services.control.GetServerInfo(control_pb2.GetServerInfoRequest())
        model = await services.inference.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert server.version == VERSION and server.protocol_version == PROTOCOL_VERSION
    # Whoever knows these could take over the session, so no public answer contains them.
    names = set(control_pb2.GetServerInfoResponse.DESCRIPTOR.fields_by_name)
    assert not names & {"scheduler_id", "session_epoch", "worker_instance_id"}
    assert server.worker_state == control_pb2.WORKER_STATE_READY and not server.draining
    assert server.uptime.ToMilliseconds() > 0
    assert model == inference_pb2.GetModelInfoResponse(
        model=MODEL,
        fingerprint="fake-model",
        dtype="float32",
        vocab_size=VOCAB_SIZE,
        max_model_len=4096,
        eos_token_ids=[0, 7],
        has_chat_template=True,
    )


async def test_before_a_worker_is_seen() -> None:
    services = Services()
    await services.start(has_worker=False)
    server = await services.control.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert server.worker_state == control_pb2.WORKER_STATE_CONNECTING
    assert await services.load() == control_pb2.GetLoadResponse()
    health = [await services.health_of(name) for name in ("", CONTROL, INFERENCE)]
    assert health == ["SERVING", "SERVING", "NOT_SERVING"]
    calls = [services.inference.GetModelInfo(inference_pb2.GetModelInfoRequest()), services.stream(stream_request())]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE and retry_delay_s(caught.value) > 0
    await services.start_worker()
    await services.wait_health("SERVING")
    assert (await services.stream(stream_request())).token_ids == true_tokens(stream_request())
    await services.stop()


async def test_load_counts_what_runs_and_what_ran() -> None:
    gate = threading.Semaphore(0)
    async with Services(FakeRunner(model_info(), gate=gate), max_num_seqs=2) as services:
        idle = await services.load()
        assert (idle.num_total_blocks, idle.num_free_blocks, idle.block_size_tokens) == (1024, 1024, 16)
        tasks = [asyncio.create_task(services.stream(stream_request([index] * 20))) for index in range(3)]
        await services.wait_load(
            lambda load: load.num_running_sequences + load.num_waiting_sequences == 3, "all three are there"
        )
        # The plans under way may be of the first request alone; the next ones admit the second.
        gate.release(2)
        await services.wait_load(lambda load: load.num_running_sequences == 2, "two run, one waits")
        load = await services.load()
        assert load.num_waiting_sequences == 1
        assert load.num_steps_in_flight in (1, 2)
        assert load.num_used_blocks == 4
        assert load.num_free_blocks + load.num_cached_blocks + load.num_used_blocks == load.num_total_blocks
        gate.release(1000)
        await asyncio.gather(*tasks)
        load = await services.load()
    assert load.num_running_sequences == load.num_waiting_sequences == load.num_steps_in_flight == 0
    assert load.num_used_blocks == 0 and load.num_cached_blocks > 0
    assert (load.num_prompt_tokens, load.num_output_tokens, load.num_worker_losses) == (60, 24, 0)
    assert load.num_steps > 0


class TimedRunner(FakeRunner):
    """Notes for each step when it was given to the runner and when it was sampled, in Unix nanoseconds. Its GPU takes
    1000 ns for a step, and idles for 10 ns before the first, 20 ns before the second, and so on.
    """

    def __init__(self) -> None:
        super().__init__(model_info())
        self.spans: list[tuple[int, int]] = []

    def execute(self, plan: StepPlan) -> Any:
        given_ns = time.time_ns()
        pending = super().execute(plan)

        def wait() -> StepResult:
            sampled_ns = time.time_ns()
            self.spans.append((given_ns, sampled_ns))
            times = StepTimes(sampled_ns=sampled_ns, gpu_duration_ns=1000, gpu_idle_ns=10 * plan.step_id)
            return dataclasses.replace(pending.wait(), times=times)

        return SimpleNamespace(wait=wait)


@pytest.mark.parametrize("depth", [1, 2])
async def test_load_has_the_times_of_steps(depth: int) -> None:
    runner = TimedRunner()
    async with Services(runner, max_plans_in_flight=depth) as services:
        began = time.monotonic_ns()
        await services.stream(stream_request(max_tokens=8))
        await services.wait_load(lambda load: not load.num_steps_in_flight, "all results are there")
        took_ns = time.monotonic_ns() - began
        load = await services.load()
    assert load.num_step_results == load.num_steps == len(runner.spans)
    # The worker's service has a plan a little before the runner.
    ends = [0, *(sampled for _, sampled in runner.spans)]
    at_least = sum(sampled - max(given, end) for (given, sampled), end in zip(runner.spans, ends, strict=False))
    assert at_least <= load.step_time_ns < took_ns
    assert load.gpu_time_ns == 1000 * len(runner.spans)
    # Every plan but the first is made while another is in flight, if more than one may be.
    queued = range(2, len(runner.spans) + 1) if depth > 1 else ()
    assert load.gpu_gap_ns == sum(10 * step_id for step_id in queued)


async def test_abort_ends_all_choices_of_a_live_request() -> None:
    gate = threading.Semaphore(0)
    request = stream_request([1] * 40, 400, num_choices=2, request_id="long")
    async with Services(FakeRunner(model_info(), gate=gate)) as services:
        tasks = [asyncio.create_task(call) for call in (services.stream(request),)]
        gate.release(4)
        await services.wait_load(lambda load: load.num_output_tokens >= 4, "some tokens")
        await services.control.Abort(control_pb2.AbortRequest(request_id="long"))
        output = await tasks[0]
        assert (await services.load()).num_used_blocks == 0
        for request_id in ("long", "never"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await services.control.Abort(control_pb2.AbortRequest(request_id=request_id))
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        gate.release(1000)
        assert (await services.stream(stream_request())).token_ids == true_tokens(stream_request())
    expected = [true_tokens(request, choice_index=index) for index in range(2)]
    for index, choice in output.choices.items():
        assert choice.finish == inference_pb2.Finish(reason=ABORT)
        assert choice.token_ids == expected[index][: len(choice.token_ids)]
    assert output.usage.num_output_tokens == sum(len(choice.token_ids) for choice in output.choices.values())


async def test_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    gate = threading.Semaphore(0)
    async with Services(FakeRunner(model_info(), gate=gate)) as services:
        running = asyncio.create_task(services.stream(stream_request()))
        await services.wait_load(lambda load: load.num_running_sequences == 1, "one runs")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.control.Drain(control_pb2.DrainRequest(), timeout=0.1)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await services.control.GetServerInfo(control_pb2.GetServerInfoRequest())).draining
        assert await services.health_of(INFERENCE) == "NOT_SERVING"
        assert await services.health_of(CONTROL) == await services.health_of("") == "SERVING"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.stream(stream_request())
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE and retry_delay_s(caught.value) > 0
        drained = asyncio.create_task(services.drain())
        gate.release(1000)
        assert (await running).token_ids == true_tokens(stream_request())
        await drained


async def test_reset_prefix_cache_forgets_what_nobody_uses() -> None:
    request = stream_request([3] * 64)
    async with Services() as services:
        cached = [(await services.stream(request)).usage.num_cached_tokens for _ in range(2)]
        reset = await services.control.ResetPrefixCache(control_pb2.ResetPrefixCacheRequest())
        cached.append((await services.stream(request)).usage.num_cached_tokens)
        load = await services.load()
    assert cached == [0, 64, 0]
    assert 4 <= reset.num_forgotten_blocks <= 5
    assert load.num_free_blocks + load.num_cached_blocks == load.num_total_blocks


async def test_a_salt_keeps_prefixes_apart() -> None:
    salts = ["", "a", "b", "a"]
    runner = FakeRunner(model_info(), salt_of=lambda sequence_id: salts[sequence_id])
    requests = [stream_request([3] * 64, cache_salt=salt, request_id=str(n)) for n, salt in enumerate(salts)]
    async with Services(runner) as services:
        cached = [(await services.stream(request)).usage.num_cached_tokens for request in requests]
    assert cached == [0, 0, 0, 64]


async def test_stopping_finishes_what_runs_within_the_grace() -> None:
    gate = threading.Semaphore(0)
    services = Services(FakeRunner(model_info(), gate=gate))
    await services.start()
    running = asyncio.create_task(services.stream(stream_request()))
    await services.wait_load(lambda load: load.num_running_sequences == 1, "one runs")
    stopping = asyncio.create_task(services.service.stop(grace_s=30))
    gate.release(1000)
    assert (await running).token_ids == true_tokens(stream_request())
    await stopping
    await services.stop()


async def test_stopping_ends_what_outlasts_the_grace() -> None:
    services = Services(FakeRunner(model_info(), gate=threading.Semaphore(0)))
    await services.start()
    running = asyncio.create_task(services.stream(stream_request()))
    await services.wait_load(lambda load: load.num_running_sequences == 1, "one runs")
    await services.service.stop(grace_s=0.05)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE and retry_delay_s(caught.value) > 0
    await services.stop()


def test_a_started_scheduler_has_not_loaded_torch() -> None:
    program = """
import asyncio, sys
import tandem_scheduler.__main__
import tandem_scheduler.processes.front_end_side.front_end_process
from tandem_scheduler.service import SchedulerService
from tandem_shared.config import SchedulerSettings

async def start():
    service = SchedulerService(SchedulerSettings(port=0, worker_address="127.0.0.1:1", api_server_count=0))
    await service.start()
    await service.stop(0)

asyncio.run(start())
print(sorted({"torch", "transformers", "safetensors", "tandem_worker"} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
