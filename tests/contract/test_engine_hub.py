"""The hub between the step loop and several front ends: each gets its own outputs, one that fails harms no other."""

import asyncio
from dataclasses import replace

import pytest

from tandem_scheduler.core.types import FinishReason
from tandem_scheduler.engine_interface import EngineState, FrontEndStats, OutputBatch, SequenceEnd, Submission
from tandem_shared.errors import ProtocolError, RequestIdInUse, SequenceFailed, WorkerUnavailable
from tests.contract.services import VOCAB_SIZE, WAIT_S, Services, model_info, stream_request, true_tokens
from tests.support.builders import create_request
from tests.support.fake_worker import FakeRunner, expected_tokens


class Listener:
    """A front end that keeps its outputs. While `is_broken` it raises instead."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, SequenceEnd] = {}
        self.is_broken = False
        self.has_news = asyncio.Event()

    def on_outputs(self, batch: OutputBatch) -> None:
        if self.is_broken and batch.token_ids:
            raise RuntimeError("the front end is broken")
        for handle, token_id in zip(batch.token_handles, batch.token_ids, strict=True):
            self.tokens.setdefault(handle, []).append(token_id)
        self.ends.update({end.handle: end for end in batch.ends})
        self.has_news.set()

    async def on_state(self, state: EngineState) -> None:
        if self.is_broken:
            raise RuntimeError("the front end is broken")

    def take_stats(self) -> FrontEndStats:
        return FrontEndStats()

    async def wait_end(self, handle: int) -> SequenceEnd:
        async with asyncio.timeout(WAIT_S):
            while handle not in self.ends:
                self.has_news.clear()
                await self.has_news.wait()
        return self.ends[handle]


def submission(request_id: str, handle: int, max_tokens: int = 8, fingerprint: str = "fake-model") -> Submission:
    return Submission(request_id, handle, create_request(max_tokens=max_tokens), 1, fingerprint)


async def test_late_news_of_an_ended_request_does_not_touch_a_new_one_of_its_id() -> None:
    async with Services(FakeRunner(model_info(), delay_s=0.005)) as services:
        first, second = Listener(), Listener()
        engine_a, engine_b = (services.service._hub.attach(listener) for listener in (first, second))
        await engine_a.submit(submission("same", 0))
        await first.wait_end(0)
        await engine_b.submit(submission("same", 7, max_tokens=60))
        async with asyncio.timeout(WAIT_S):
            while not second.tokens.get(7):
                await asyncio.sleep(0.001)
        engine_a.stop(0, 1)
        engine_a.close_request(0)
        end = await second.wait_end(7)
    assert end.reason is FinishReason.LENGTH
    truth = create_request(max_tokens=60)
    assert second.tokens[7] == expected_tokens(truth, vocab_size=VOCAB_SIZE)


async def test_a_client_tries_again_before_the_end_of_its_front_end_is_noticed() -> None:
    """While the scheduler process is busy, the end of the front end and the second try both wait to be read, and the
    second try may be read first.
    """
    async with Services(FakeRunner(model_info(), delay_s=0.005)) as services:
        hub, second, has_ended = services.service._hub, Listener(), False
        engine_a, engine_b = hub.attach(Listener(), lambda: has_ended), hub.attach(second)
        await engine_a.submit(submission("same", 0, max_tokens=500))
        with pytest.raises(RequestIdInUse):
            await engine_b.submit(submission("same", 7))
        has_ended = True
        await engine_b.submit(submission("same", 7))
        hub.detach(engine_a)
        assert (await second.wait_end(7)).reason is FinishReason.LENGTH
        assert second.tokens[7] == expected_tokens(create_request(max_tokens=8), vocab_size=VOCAB_SIZE)
        assert (await services.load()).num_used_blocks == 0


async def test_a_front_end_that_raises_ends_its_own_requests_and_loses_no_worker() -> None:
    async with Services(FakeRunner(model_info(), delay_s=0.002)) as services:
        broken = Listener()
        engine = services.service._hub.attach(broken)
        other = asyncio.create_task(services.stream(stream_request(max_tokens=100)))
        await engine.submit(submission("mine", 3, max_tokens=100))
        broken.is_broken = True
        end = await broken.wait_end(3)
        assert end.reason is FinishReason.ERROR and isinstance(end.error, SequenceFailed)
        assert (await other).token_ids == true_tokens(stream_request(max_tokens=100))
        load = await services.load()
        assert load.num_worker_losses == load.num_used_blocks == 0
        # It raises at each change of state that it is told, and delays no one.
        await services.stop_worker()
        await services.wait_health("NOT_SERVING")
        await services.start_worker()
        assert (await services.stream(stream_request())).token_ids == true_tokens(stream_request())


async def test_a_request_checked_against_another_model_is_refused() -> None:
    async with Services() as services:
        engine = services.service._hub.attach(Listener())
        with pytest.raises(WorkerUnavailable, match="another model"):
            await engine.submit(submission("r", 0, fingerprint="the model before"))


async def test_a_stop_that_is_found_after_an_error_still_counts() -> None:
    async with Services(FakeRunner(model_info(), delay_s=0.002)) as services:
        hub, listener = services.service._hub, Listener()
        engine = hub.attach(listener)
        await engine.submit(submission("r", 0, max_tokens=1000))
        async with asyncio.timeout(WAIT_S):
            while len(listener.tokens.get(0, [])) < 5:
                await asyncio.sleep(0.001)
        hub.end_all(WorkerUnavailable("gone"))
        await listener.wait_end(0)
        engine.stop(0, 2)
        assert (await services.load()).num_output_tokens == 2


async def test_a_stop_told_late_and_wrongly_leaves_the_books_right() -> None:
    async with Services(FakeRunner(model_info())) as services:
        listener = Listener()
        engine = services.service._hub.attach(listener)
        await engine.submit(submission("stopped", 0, max_tokens=8))
        await listener.wait_end(0)
        for num_output_tokens in (2**32 - 1, 5, 5, 7):
            engine.stop(0, num_output_tokens)
        load = await services.load()
    assert (load.num_output_tokens, load.num_overshoot_tokens) == (5, 3)


async def test_a_handle_that_is_given_twice_is_refused() -> None:
    async with Services(FakeRunner(model_info())) as services:
        listener = Listener()
        engine = services.service._hub.attach(listener)
        await engine.submit(submission("first", 4, max_tokens=8))
        with pytest.raises(ProtocolError):
            await engine.submit(replace(submission("second", 3), num_choices=2))
        assert (await listener.wait_end(4)).reason is FinishReason.LENGTH
        engine.close_request(4)
        await services.service._hub.drain()
