"""The step loop against a worker whose failures come at chosen moments: what the core confirmed is always delivered."""

import time
from dataclasses import replace

import pytest

from tandem_scheduler.core.types import FinishedSequence, SchedulerConfig, StepOutputs
from tandem_scheduler.engine.chunk_pace import FIRST_TOKENS_ON_CPU
from tandem_shared.errors import DeadlinePassed
from tests.support.builders import create_request, create_requests
from tests.support.fake_worker import expected_tokens
from tests.unit.scheduler.engine.step_loops import Collector, FlakyClient, running_loop


@pytest.mark.parametrize("max_plans_in_flight", [1, 2, 4])
@pytest.mark.parametrize("sends", [[1], [5], [6], [9, 7]])
async def test_tokens_survive_a_loss_while_the_next_plan_is_sent(max_plans_in_flight: int, sends: list[int]) -> None:
    requests = create_requests(3, prompt_len=20, max_tokens=25)
    sink = Collector(len(requests))
    config = SchedulerConfig(max_plans_in_flight=max_plans_in_flight)
    async with running_loop(FlakyClient(sends), sink, config) as step_loop:
        step_loop.submit(requests)
        await sink.all_ended.wait()
    assert step_loop.scheduler is not None and step_loop.scheduler.load().num_worker_losses == len(sends)
    assert sink.tokens == {request.sequence_id: expected_tokens(request) for request in requests}


async def test_what_waits_past_its_deadline_ends_and_what_comes_past_it_is_refused() -> None:
    sink, requests = Collector(2), create_requests(2, max_tokens=1000)
    async with running_loop(FlakyClient(), sink, SchedulerConfig(max_num_seqs=1)) as step_loop:
        # Both come at once, so the second waits, and its deadline passes before the step loop has another turn.
        step_loop.submit([requests[0]])
        step_loop.submit([replace(requests[1], deadline=time.monotonic() + 0.01)])
        time.sleep(0.02)
        with pytest.raises(DeadlinePassed):
            step_loop.submit([create_request(9, deadline=time.monotonic())])
        await sink.all_ended.wait()
    assert sink.tokens == {0: expected_tokens(requests[0])}


async def test_a_cpu_gets_long_prompts_in_chunks_that_follow_its_speed() -> None:
    client, sink = FlakyClient(), Collector(1)
    request = create_requests(1, prompt_len=2000, max_tokens=3)[0]
    async with running_loop(client, sink) as step_loop:
        step_loop.submit([request])
        await sink.all_ended.wait()
    chunks = client.sessions[0].chunks
    assert chunks[0] == FIRST_TOKENS_ON_CPU and sum(chunks) == 2000
    # This worker is fast, so the chunks grow.
    assert max(chunks) > FIRST_TOKENS_ON_CPU
    assert sink.tokens == {request.sequence_id: expected_tokens(request)}


class RaisingSink(Collector):
    """A sink that fails at its third step, and notes the sequences whose outputs were lost."""

    def __init__(self, num_sequences: int) -> None:
        super().__init__(num_sequences)
        self.num_steps = 0
        self.lost: list[int] = []

    def on_outputs(self, outputs: StepOutputs) -> None:
        self.num_steps += 1
        if self.num_steps == 3:
            raise RuntimeError("the sink is broken")
        super().on_outputs(outputs)

    def on_outputs_lost(self, sequence_ids: list[int], finished: list[FinishedSequence]) -> None:
        self.lost += sequence_ids
        self.all_ended.set()


async def test_a_sink_that_raises_costs_its_sequences_and_not_the_worker() -> None:
    sink, client, requests = RaisingSink(2), FlakyClient(), create_requests(2, max_tokens=25)
    async with running_loop(client, sink) as step_loop:
        step_loop.submit(requests)
        await sink.all_ended.wait()
        assert sorted(sink.lost) == [request.sequence_id for request in requests]
        assert step_loop.scheduler is not None and step_loop.scheduler.load().num_worker_losses == 0
    assert len(client.sessions) == 1
