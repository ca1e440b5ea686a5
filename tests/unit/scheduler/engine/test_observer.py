"""The events that an observer gets of a run whose truth is known, and an observer that fails."""

import asyncio
from collections import Counter
from dataclasses import replace
from typing import TypeVar

import pytest

from tandem_scheduler.core.types import FinishReason, SchedulerConfig
from tandem_scheduler.engine.hub import Attachment, EngineHub
from tandem_scheduler.engine.observer import (
    Event,
    FirstToken,
    PlanMade,
    PlanSent,
    RequestClosed,
    RequestEnded,
    RequestRefused,
    RequestSubmitted,
    StepDone,
    WorkerAttached,
    WorkerLost,
)
from tandem_scheduler.engine_interface import EngineState, FrontEndStats, OutputBatch, RequestOutcome, Submission
from tandem_shared.errors import RequestIdInUse, SequenceFailed
from tandem_shared.step_codec import encode_plan
from tandem_shared.step_plan import StepTimes
from tests.support.builders import create_request, create_requests, worker_info
from tests.support.fake_worker import expected_tokens
from tests.unit.scheduler.engine.step_loops import Collector, FlakyClient, running_loop

E = TypeVar("E")


def of_type(events: list[Event], kind: type[E]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]


async def observe(client: FlakyClient, requests: list, **config: object) -> tuple[list[Event], int]:
    """Runs requests to their ends. Gives the events, and how many preemptions the scheduler counted."""
    events: list[Event] = []
    sink = Collector(len(requests))
    async with running_loop(client, sink, SchedulerConfig(**config), observer=events.append) as step_loop:
        step_loop.submit(requests)
        await sink.all_ended.wait()
        assert sink.tokens == {request.sequence_id: expected_tokens(request) for request in requests}
        assert step_loop.scheduler is not None
        return events, step_loop.scheduler.load().num_preemptions


async def test_plans_and_results_account_for_every_token() -> None:
    requests = create_requests(4, prompt_len=30, max_tokens=9)
    events, _ = await observe(FlakyClient(), requests, max_plans_in_flight=1, max_num_batched_tokens=20, max_num_seqs=3)
    plans, results = of_type(events, PlanMade), of_type(events, StepDone)
    assert [done.plan for done in results] == plans
    assert [done.result.step_id for done in results] == [plan.plan.step_id for plan in plans]
    assert sum(plan.num_prompt_tokens for plan in plans) == 4 * 30
    # The first output token is sampled by the last chunk of a prompt.
    assert sum(plan.num_decoding_rows for plan in plans) == 4 * (9 - 1)
    assert sum(len(done.outputs.token_ids) for done in results) == 4 * 9
    assert all(0 <= plan.made_at <= done.received_at for plan, done in zip(plans, results, strict=True))
    assert {plan.num_in_flight for plan in plans} == {1}
    sent = of_type(events, PlanSent)
    assert [event.plan for event in sent] == plans
    assert [event.num_bytes for event in sent] == [encode_plan(plan.plan).ByteSize() for plan in plans]
    steady = next(plan for plan in plans if not plan.num_prompt_tokens and not len(plan.plan.removed_rows))
    assert sent[plans.index(steady)].num_bytes < 10 < sent[0].num_bytes
    # The fake worker's times are zeros.
    assert results[0].wire_s == results[0].received_at - plans[0].made_at
    # Its clock is set by an hour while it has the plan.
    for set_by_ns, wire_s in ((3600 * 10**9, 0), (-3600 * 10**9, results[0].wire_s)):
        times = StepTimes(received_ns=10**18, sent_ns=10**18 + set_by_ns)
        assert replace(results[0], result=replace(results[0].result, times=times)).wire_s == wire_s


async def test_losses_of_the_worker() -> None:
    events, _ = await observe(FlakyClient([5, 6]), create_requests(3, max_tokens=25))
    changes = [event for event in events if isinstance(event, WorkerAttached | WorkerLost)]
    assert [(type(event), event.epoch) for event in changes] == [
        (WorkerAttached, 1),
        (WorkerLost, 1),
        (WorkerAttached, 2),
        (WorkerLost, 2),
        (WorkerAttached, 3),
    ]
    assert {(event.reason, event.num_live_sequences) for event in of_type(events, WorkerLost)} == {("broken pipe", 3)}


async def test_preemptions() -> None:
    client = FlakyClient(info=worker_info(block_size=4, num_blocks=9))
    events, num_preemptions = await observe(client, create_requests(2, prompt_len=8, max_tokens=20))
    assert sum(plan.num_preempted for plan in of_type(events, PlanMade)) == num_preemptions > 0


async def test_an_observer_that_raises_harms_nothing_and_is_heard_of_once(caplog: pytest.LogCaptureFixture) -> None:
    seen: Counter[type[Event]] = Counter()

    def fail(event: Event) -> None:
        seen[type(event)] += 1
        raise RuntimeError("the observer is broken")

    sink, requests = Collector(2), create_requests(2, max_tokens=25)
    async with running_loop(FlakyClient([5]), sink, observer=fail) as step_loop:
        step_loop.submit(requests)
        await sink.all_ended.wait()
    assert sink.tokens == {request.sequence_id: expected_tokens(request) for request in requests}
    assert seen[PlanMade] > 20 and seen[StepDone] > 20 and seen[WorkerAttached] == 2
    said = [record.getMessage() for record in caplog.records if "observer failed" in record.getMessage()]
    assert len(said) == len(seen)


class Listener:
    """A front end that notes which of its sequences have ended."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.ended: set[int] = set()
        self.has_news = asyncio.Event()

    def on_outputs(self, batch: OutputBatch) -> None:
        self.num_tokens += len(batch.token_ids)
        self.ended.update(end.handle for end in batch.ends)
        self.has_news.set()

    async def on_state(self, state: EngineState) -> None:
        pass

    def take_stats(self) -> FrontEndStats:
        return FrontEndStats()

    async def wait_for(self, *handles: int) -> None:
        async with asyncio.timeout(10):
            while not self.ended.issuperset(handles):
                await self.has_news.wait()
                self.has_news.clear()


async def submit(engine: Attachment, request_id: str, handle: int, num_choices: int = 1, max_tokens: int = 8) -> None:
    request = create_request(prompt=range(20), max_tokens=max_tokens)
    await engine.submit(Submission(request_id, handle, request, num_choices, "fake-model"))


async def test_the_life_of_requests() -> None:
    events: list[Event] = []
    hub, listener = EngineHub(events.append), Listener()
    async with running_loop(FlakyClient(), hub):
        engine = hub.attach(listener)
        await submit(engine, "both", 0, num_choices=2)
        with pytest.raises(RequestIdInUse):
            await submit(engine, "both", 9)
        await listener.wait_for(0, 1)
        await submit(engine, "cancelled", 2, max_tokens=2000)
        while listener.num_tokens < 2 * 8 + 5:
            await listener.has_news.wait()
            listener.has_news.clear()
        outcome = RequestOutcome(1.0, 2.0, 3.0, (FinishReason.ABORT,), (4,))
        engine.close_request(2, outcome)
        await submit(engine, "aborted", 3, max_tokens=2000)
        hub.abort("aborted")
        await submit(engine, "stopped", 4, max_tokens=2000)
        engine.stop(4, 0)
        await submit(engine, "failed", 5, max_tokens=2000)
        error = SequenceFailed("the test ends it")
        hub.end_all(error)
        hub.detach(engine)
    submitted = {event.request_id: event for event in of_type(events, RequestSubmitted)}
    event = submitted["both"]
    assert event == RequestSubmitted("both", 0, 2, num_prompt_tokens=20, max_tokens=8, sampling=event.sampling)
    assert [event.first_sequence_id for event in submitted.values()] == [0, 2, 3, 4, 5]
    [refused] = of_type(events, RequestRefused)
    assert refused.request_id == "both" and isinstance(refused.error, RequestIdInUse)
    assert [event.request.request_id for event in of_type(events, FirstToken)] == ["both", "cancelled"]
    ended = {event.request.request_id: event for event in of_type(events, RequestEnded)}
    assert len(of_type(events, RequestEnded)) == len(ended)
    both, cancelled = ended["both"], ended["cancelled"]
    assert both == RequestEnded(submitted["both"], (FinishReason.LENGTH,) * 2, 16, both.num_cached_tokens, None)
    # The second choice shares a block of its prompt with the first.
    assert both.num_cached_tokens == 16
    assert cancelled.reasons == (FinishReason.ABORT,) and 5 <= cancelled.num_output_tokens < 2000
    assert (ended["aborted"].reasons, ended["stopped"].reasons) == ((FinishReason.ABORT,), (FinishReason.STOP,))
    assert ended["failed"].reasons == (FinishReason.ERROR,) and ended["failed"].error is error
    closed = {event.ended.request.request_id: event for event in of_type(events, RequestClosed)}
    # The front end went without a word of the others.
    assert closed == {name: RequestClosed(end, outcome if name == "cancelled" else None) for name, end in ended.items()}
    places = [events.index(event) for event in (submitted["both"], of_type(events, FirstToken)[0], both)]
    assert places == sorted(places)
