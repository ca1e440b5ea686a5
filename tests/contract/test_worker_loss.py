"""The worker dies, hangs or changes under running streams. The truth is the fake model's undisturbed output."""

import asyncio
from collections.abc import Sequence

import grpc
import pytest

from tandem.v1 import control_pb2, inference_pb2
from tandem_scheduler.core.suspects import MAX_FAILED_TRIALS
from tandem_shared.step_plan import StepPlan, WorkerInfo
from tests.contract.gated_worker import MANY, gated_runner, kill_worker, open_gate
from tests.contract.services import (
    CONTROL,
    INFERENCE,
    Services,
    StreamedOutput,
    model_info,
    read_stream,
    retry_delay_s,
    stream_request,
    true_tokens,
    wait_until,
)
from tests.support.fake_worker import FakePendingStep, FakeRunner


def make_requests(count: int = 8, max_tokens: int = 40) -> list[inference_pb2.GenerateStreamRequest]:
    """Requests of which half are greedy and half seeded, and some share a prompt."""
    return [
        stream_request(range(1, 20 + 5 * (index // 2)), max_tokens + index, temperature=float(index % 2), seed=index)
        for index in range(count)
    ]


class Streams:
    """Streams that are read while a test does something else."""

    def __init__(self, services: Services, requests: Sequence[inference_pb2.GenerateStreamRequest]) -> None:
        self.requests = requests
        self.outputs = [StreamedOutput() for _ in requests]
        self.tasks = [
            asyncio.create_task(read_stream(services.inference.GenerateStream(request), output))
            for request, output in zip(requests, self.outputs, strict=True)
        ]

    async def wait_tokens(self, count: int) -> None:
        async def have_tokens() -> bool:
            return all(len(output.token_ids) >= count for output in self.outputs)

        await wait_until(have_tokens, f"{count} tokens of each stream")

    async def wait_total(self, count: int) -> None:
        async def have_tokens() -> bool:
            return sum(len(output.token_ids) for output in self.outputs) >= count

        await wait_until(have_tokens, f"{count} tokens in all")

    @classmethod
    async def mid_way(
        cls, services: Services, requests: Sequence[inference_pb2.GenerateStreamRequest], num_steps: int = 8
    ) -> "Streams":
        """Starts all streams on a worker whose gate is closed, and lets it run for so many steps."""
        streams = cls(services, requests)
        await services.wait_load(
            lambda load: load.num_running_sequences + load.num_waiting_sequences == len(requests), "all have come"
        )
        open_gate(services.runner, num_steps)
        # Plans that were in flight when the last request came don't include it.
        await streams.wait_tokens(num_steps - 5)
        return streams

    async def check_truth(self) -> None:
        await asyncio.gather(*self.tasks)
        assert [output.token_ids for output in self.outputs] == [true_tokens(request) for request in self.requests]
        assert [output.usage.num_output_tokens for output in self.outputs] == [
            len(output.token_ids) for output in self.outputs
        ]


@pytest.mark.parametrize("num_kills", [1, 2])
@pytest.mark.parametrize("max_plans_in_flight", [1, 2, 4])
async def test_streams_go_on_with_the_next_worker(num_kills: int, max_plans_in_flight: int) -> None:
    async with Services(gated_runner(0), max_plans_in_flight=max_plans_in_flight) as services:
        streams = await Streams.mid_way(services, make_requests(), num_steps=15)
        for number in range(1, num_kills + 1):
            await kill_worker(services)
            num_tokens = sum(len(output.token_ids) for output in streams.outputs)
            is_last = number == num_kills
            await services.start_worker(gated_runner(number, MANY if is_last else 12))
            if not is_last:
                await streams.wait_total(num_tokens + 1)
        await streams.check_truth()
        step_loop = services.service.step_loop
        load = await services.load()
    assert step_loop.worker is not None
    assert step_loop.epoch == num_kills + 1 and step_loop.worker.worker_instance_id == f"worker-{num_kills}"
    assert load.num_worker_losses == num_kills and load.num_used_blocks == 0


async def test_while_the_worker_is_away_calls_queue_and_readiness_says_so() -> None:
    async with Services(gated_runner(0)) as services:
        streams = await Streams.mid_way(services, make_requests(2))
        await kill_worker(services)
        await services.wait_health("NOT_SERVING")
        assert await services.health_of("") == await services.health_of(CONTROL) == "SERVING"
        server = await services.control.GetServerInfo(control_pb2.GetServerInfoRequest())
        assert server.worker_state == control_pb2.WORKER_STATE_LOST
        later = Streams(services, make_requests(4, max_tokens=9))
        await services.wait_load(lambda load: load.num_waiting_sequences == 6, "all wait")
        assert (await services.load()).num_used_blocks == 0
        await services.start_worker(gated_runner(1, MANY))
        await streams.check_truth()
        await later.check_truth()
        assert await services.health_of(INFERENCE) == "SERVING"


async def test_what_is_cancelled_or_aborted_while_the_worker_is_away_stays_so() -> None:
    to_abort = stream_request(max_tokens=50, request_id="aborted")
    async with Services(gated_runner(0)) as services:
        streams = await Streams.mid_way(services, [*make_requests(2), to_abort])
        await kill_worker(services)
        kept, cancelled, aborted = streams.tasks
        cancelled.cancel()
        await services.control.Abort(control_pb2.AbortRequest(request_id="aborted"))
        output = await aborted
        assert output.choices[0].finish == inference_pb2.Finish(reason=inference_pb2.FINISH_REASON_ABORT)
        await services.wait_load(lambda load: load.num_waiting_sequences == 1, "one is left")
        await services.start_worker(gated_runner(1, MANY))
        assert (await kept).token_ids == true_tokens(streams.requests[0])


async def test_no_worker_in_time_ends_all_with_advice_and_a_later_worker_serves_again() -> None:
    async with Services(gated_runner(0), worker_wait_s=0.2) as services:
        streams = await Streams.mid_way(services, make_requests(3))
        await kill_worker(services)
        errors = await asyncio.gather(*streams.tasks, return_exceptions=True)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.stream(stream_request())
        for error in [*errors, caught.value]:
            assert isinstance(error, grpc.aio.AioRpcError)
            assert error.code() == grpc.StatusCode.UNAVAILABLE and retry_delay_s(error) > 0
        load = await services.load()
        assert load.num_waiting_sequences == load.num_running_sequences == load.num_used_blocks == 0
        await services.start_worker(gated_runner(1, MANY))
        await services.wait_health("SERVING")
        assert (await services.stream(stream_request())).token_ids == true_tokens(stream_request())


async def test_a_long_step_that_gets_on_is_no_loss() -> None:
    """A step that takes five times both limits, the scheduler's and the worker's own, brings its tokens in the end."""
    async with Services(gated_runner(0), step_timeout_s=0.8, worker_step_timeout_s=0.8) as services:
        streams = await Streams.mid_way(services, make_requests(3))
        assert isinstance(services.runner, FakeRunner)
        for _ in range(80):
            await asyncio.sleep(0.05)
            services.runner.progress += 1
        assert (await services.load()).num_worker_losses == services.num_failures == 0
        # Results count as progress too.
        open_gate(services.runner)
        await streams.check_truth()
        assert (await services.load()).num_worker_losses == 0


async def test_a_step_that_hangs_ends_the_worker_and_streams_go_on_with_the_next() -> None:
    """The worker's own watchdog ends it, although its scheduler would wait longer."""
    async with Services(gated_runner(0), worker_step_timeout_s=0.4) as services:
        streams = await Streams.mid_way(services, make_requests(3))
        runner = services.runner

        async def has_failed() -> bool:
            return services.num_failures == 1

        await wait_until(has_failed, "the watchdog bites")
        open_gate(runner)
        await streams.check_truth()
        assert (await services.load()).num_worker_losses == 1


async def test_a_worker_that_hangs_past_the_watchdog_is_lost_and_may_come_back() -> None:
    async with Services(gated_runner(0), step_timeout_s=1.5) as services:
        streams = await Streams.mid_way(services, make_requests(4))
        await services.wait_load(lambda load: load.num_worker_losses == 1, "the watchdog bites")
        assert all(not task.done() for task in streams.tasks)
        open_gate(services.runner)
        await streams.check_truth()
        assert (await services.load()).num_worker_losses == 1


POISON = 999
"""The first token of a poisonous prompt."""


class PoisonedRunner(FakeRunner):
    """A worker that fails whenever the poison is in its batch."""

    def execute(self, plan: StepPlan) -> FakePendingStep:
        if any(row.token_ids[0] == POISON for row in plan.added_rows):
            raise RuntimeError("the poison works")
        return super().execute(plan)


async def test_a_poisonous_request_ends_and_all_others_complete() -> None:
    async with Services(PoisonedRunner(model_info())) as services:
        streams = Streams(services, make_requests(64, max_tokens=60))
        await streams.wait_tokens(1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.stream(stream_request([POISON]))
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert "the poison works" in (caught.value.details() or "")
        await streams.check_truth()
        # Two losses make a suspect, and then its trials count.
        num_losses = 2 + MAX_FAILED_TRIALS
        assert (await services.load()).num_worker_losses == services.num_failures == num_losses


class AskedRunner(FakeRunner):
    """A worker that counts how often it was asked for its info."""

    num_questions = 0

    @property
    def info(self) -> WorkerInfo:
        self.num_questions += 1
        return super().info

    async def was_asked_again(self) -> bool:
        return self.num_questions >= 3


async def test_live_requests_wait_for_their_own_model() -> None:
    async with Services(gated_runner(0)) as services:
        streams = await Streams.mid_way(services, make_requests(2))
        await kill_worker(services)
        other = AskedRunner(model_info(worker_instance_id="worker-1", fingerprint="other-model"))
        await services.start_worker(other)
        await wait_until(other.was_asked_again, "the scheduler has refused the other worker")
        assert await services.health_of(INFERENCE) == "NOT_SERVING"
        await services.stop_worker()
        await services.start_worker(gated_runner(2, MANY))
        await streams.check_truth()
        assert other.num_steps == 0


async def test_with_no_live_request_another_model_is_taken() -> None:
    async with Services(gated_runner(0, MANY)) as services:
        await services.stream(stream_request())
        await kill_worker(services)
        await services.start_worker(gated_runner(1, MANY, fingerprint="other-model", block_size=32, num_blocks=65))
        await services.wait_health("SERVING")
        info = await services.inference.GetModelInfo(inference_pb2.GetModelInfoRequest())
        assert info.fingerprint == "other-model"
        assert (await services.load()).num_total_blocks == 64
        request = stream_request(range(1, 100), 50)
        assert (await services.stream(request)).token_ids == true_tokens(request)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "Qwen3-8B"}, "the worker serves 'Qwen3-8B', this scheduler 'embedded'"),
        ({"tokenizer_digest": "another"}, "tokenizer.json is another"),
        ({"vocab_size": 1000}, "the worker's model a vocabulary of 1000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_worker_with_another_model_is_refused_and_the_log_says_why(
    changes: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    services = Services(AskedRunner(model_info(**changes)))
    await services.start(has_worker=False)
    await services.start_worker()
    runner = services.runner
    assert isinstance(runner, AskedRunner)
    await wait_until(runner.was_asked_again, "the scheduler has refused the worker")
    assert await services.health_of(INFERENCE) == "NOT_SERVING"
    assert runner.num_steps == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(reason in warning for warning in warnings), warnings
    await services.stop_worker()
    await services.start_worker(FakeRunner(model_info()))
    await services.wait_health("SERVING")
    await services.stop()


async def test_a_request_that_comes_while_another_model_is_taken_waits_for_its_own() -> None:
    """The scheduler has no live request when it asks the worker, and one when the session is open."""
    async with Services(gated_runner(0, MANY)) as services:
        step_loop = services.service.step_loop
        open_session = step_loop._client.open_session
        requests: list[asyncio.Task[StreamedOutput]] = []

        async def open_late(*arguments: object) -> object:
            session = await open_session(*arguments)  # type: ignore[arg-type]
            if arguments[0].fingerprint == "other-model" and not requests:  # type: ignore[attr-defined]
                requests.append(asyncio.create_task(services.stream(stream_request())))
                async with asyncio.timeout(10):
                    while not step_loop.scheduler.num_unfinished:  # type: ignore[union-attr]
                        await asyncio.sleep(0.001)
            return session

        step_loop._client.open_session = open_late  # type: ignore[method-assign, assignment]
        await kill_worker(services)
        other = gated_runner(1, MANY, fingerprint="other-model")
        await services.start_worker(other)
        async with asyncio.timeout(10):
            while not requests:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert other.num_steps == 0
        await services.stop_worker()
        await services.start_worker(gated_runner(2, MANY))
        assert (await requests[0]).token_ids == true_tokens(stream_request())
