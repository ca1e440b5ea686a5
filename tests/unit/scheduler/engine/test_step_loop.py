"""The step loop against a worker whose failures come at chosen moments: what the core confirmed is always delivered."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tandem_scheduler.core.types import FinishedSequence, SchedulerConfig, StepOutputs
from tandem_scheduler.engine.chunk_pace import FIRST_TOKENS_ON_CPU
from tandem_scheduler.engine.step_loop import StepLoop
from tandem_shared.errors import DeadlinePassed, WorkerUnavailable
from tandem_shared.step_plan import StepPlan, StepResult, WorkerInfo
from tests.support.builders import create_request, create_requests, worker_info
from tests.support.fake_worker import FakeRunner, expected_tokens


class FlakySession:
    """Runs plans at once. After `num_sends` plans, sending fails; results of earlier plans still come."""

    def __init__(self, num_sends: int | None) -> None:
        self.info = worker_info()
        self.heard_at = 0.0
        self.chunks: list[int] = []
        self._runner = FakeRunner(self.info)
        self._num_sends = num_sends
        self._results: asyncio.Queue[StepResult] = asyncio.Queue()

    async def send(self, plan: StepPlan) -> None:
        await asyncio.sleep(0)
        if self._num_sends is not None and plan.step_id > self._num_sends:
            raise WorkerUnavailable("broken pipe")
        self.chunks.append(int(plan.chunk_num_tokens.sum()))
        self._results.put_nowait(self._runner.execute(plan).wait())

    async def results(self) -> AsyncIterator[StepResult]:
        while True:
            yield await self._results.get()

    async def close(self) -> None:
        pass


class FlakyClient:
    """Each session lasts for so many plans; the last one for ever."""

    def __init__(self, sends: list[int]) -> None:
        self._sends: list[int | None] = [*sends, None]
        self.sessions: list[FlakySession] = []

    async def get_info(self, timeout_s: float) -> WorkerInfo:
        return worker_info()

    async def open_session(
        self, info: WorkerInfo, scheduler_id: str, epoch: int, num_live_sequences: int
    ) -> FlakySession:
        self.sessions.append(FlakySession(self._sends.pop(0)))
        return self.sessions[-1]

    async def close(self) -> None:
        pass


class Collector:
    """A sink that keeps each sequence's tokens."""

    def __init__(self, num_sequences: int) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ready = asyncio.Event()
        self.all_ended = asyncio.Event()
        self._num_left = num_sequences

    def on_outputs(self, outputs: StepOutputs) -> None:
        for sequence_id, token_id in zip(outputs.sequence_ids, outputs.token_ids, strict=True):
            self.tokens.setdefault(sequence_id, []).append(token_id)
        self.on_finished(outputs.finished)

    def on_finished(self, finished: list[FinishedSequence]) -> None:
        self._num_left -= len(finished)
        if not self._num_left:
            self.all_ended.set()

    def on_worker_gone(self, error: WorkerUnavailable) -> None:
        raise AssertionError(error)

    async def on_readiness(self, is_ready: bool) -> None:
        if is_ready:
            self.ready.set()


@pytest.mark.parametrize("max_plans_in_flight", [1, 2, 4])
@pytest.mark.parametrize("sends", [[1], [5], [6], [9, 7]])
async def test_tokens_survive_a_loss_while_the_next_plan_is_sent(max_plans_in_flight: int, sends: list[int]) -> None:
    requests = create_requests(3, prompt_len=20, max_tokens=25)
    sink = Collector(len(requests))
    step_loop = StepLoop(
        FlakyClient(sends),
        SchedulerConfig(max_plans_in_flight=max_plans_in_flight),
        sink,
        scheduler_id="test",
        worker_wait_s=10,
        step_timeout_s=10,
    )
    running = asyncio.create_task(step_loop.run())
    await sink.ready.wait()
    step_loop.submit(requests)
    await sink.all_ended.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert step_loop.scheduler is not None and step_loop.scheduler.load().num_worker_losses == len(sends)
    assert sink.tokens == {request.sequence_id: expected_tokens(request) for request in requests}


async def test_what_waits_past_its_deadline_ends_and_what_comes_past_it_is_refused() -> None:
    client, sink = FlakyClient([]), Collector(2)
    config = SchedulerConfig(max_num_seqs=1)
    step_loop = StepLoop(client, config, sink, scheduler_id="test", worker_wait_s=10, step_timeout_s=10)
    running = asyncio.create_task(step_loop.run())
    await sink.ready.wait()
    requests = create_requests(2, max_tokens=1000)
    # Both come at once, so the second waits, and its time passes before the loop has another turn.
    step_loop.submit([requests[0]])
    step_loop.submit([replace(requests[1], deadline=time.monotonic() + 0.01)])
    time.sleep(0.02)
    with pytest.raises(DeadlinePassed):
        step_loop.submit([create_request(9, deadline=time.monotonic())])
    await sink.all_ended.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert sink.tokens == {0: expected_tokens(requests[0])}


async def test_a_cpu_gets_long_prompts_in_chunks_that_follow_its_speed() -> None:
    client, sink = FlakyClient([]), Collector(1)
    step_loop = StepLoop(client, SchedulerConfig(), sink, scheduler_id="test", worker_wait_s=10, step_timeout_s=10)
    running = asyncio.create_task(step_loop.run())
    await sink.ready.wait()
    request = create_requests(1, prompt_len=2000, max_tokens=3)[0]
    step_loop.submit([request])
    await sink.all_ended.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    chunks = client.sessions[0].chunks
    assert chunks[0] == FIRST_TOKENS_ON_CPU and sum(chunks) == 2000
    # This one is fast, so they grow.
    assert max(chunks) > FIRST_TOKENS_ON_CPU
    assert sink.tokens == {request.sequence_id: expected_tokens(request)}


class RaisingSink(Collector):
    """Can't take its third step, and notes whose news that were."""

    def __init__(self, num_sequences: int) -> None:
        super().__init__(num_sequences)
        self.num_steps = 0
        self.lost: list[int] = []

    def on_outputs(self, outputs: StepOutputs) -> None:
        self.num_steps += 1
        if self.num_steps == 3:
            raise RuntimeError("the sink is broken")
        super().on_outputs(outputs)

    def on_news_lost(self, sequence_ids: list[int], finished: list[FinishedSequence]) -> None:
        self.lost += sequence_ids
        self.all_ended.set()


async def test_a_sink_that_raises_costs_its_sequences_and_not_the_worker() -> None:
    sink = RaisingSink(2)
    client = FlakyClient([])
    step_loop = StepLoop(client, SchedulerConfig(), sink, scheduler_id="test", worker_wait_s=10, step_timeout_s=10)
    running = asyncio.create_task(step_loop.run())
    await sink.ready.wait()
    requests = create_requests(2, max_tokens=25)
    step_loop.submit(requests)
    await sink.all_ended.wait()
    assert sorted(sink.lost) == [request.sequence_id for request in requests]
    assert step_loop.scheduler is not None and step_loop.scheduler.load().num_worker_losses == 0
    assert len(client.sessions) == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
