"""Random events against the scheduler core, its plans executed by the fake worker.

After each move the books must balance; every output must be what the request gives when computed alone; every
sequence must end. The fake worker fails on any read or write of a slot that is not the row's own.
"""

from collections import Counter
from typing import ClassVar

import hypothesis.strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.suspects import MAX_FAILED_TRIALS
from tandem_scheduler.core.types import FinishedSequence, FinishReason, SchedulerConfig, SequenceRequest
from tandem_shared.errors import InvalidRequest, QueueFull, RequestIdInUse
from tandem_shared.step_plan import FAULT_GRAMMAR, FAULT_NAN_LOGITS, FAULT_NO_TOKEN, WorkerInfo
from tests.support.builders import create_request
from tests.support.engine import Engine
from tests.support.fake_worker import FakeRunner, expected_prompt_logprobs, expected_tokens
from tests.unit.scheduler.core.strategies import VOCAB_SIZE, configs, prompts, requests, workers


class SchedulerMachine(RuleBasedStateMachine):
    """One scheduler and its worker. `seen` counts events over all examples, so that a test can see what was reached."""

    seen: ClassVar[Counter[str]] = Counter()

    @initialize(config=configs, worker=workers())
    def start(self, config: SchedulerConfig, worker: WorkerInfo) -> None:
        self.config = config
        self.salts: dict[int, str] = {}
        self.requests: dict[int, SequenceRequest] = {}
        self.expected: dict[int, list[int]] = {}
        self.num_losses: Counter[int] = Counter()
        self.is_lost = False
        self.num_delivered = 0
        self.now = 0
        self.engine = Engine(Scheduler(config, worker), self.make_runner(worker))

    def make_runner(self, worker: WorkerInfo) -> FakeRunner:
        return FakeRunner(worker, salt_of=lambda sequence_id: self.salts.get(sequence_id, ""))

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    # Moves

    @rule(request=requests)
    def add(self, request: SequenceRequest) -> None:
        sequence_id = request.sequence_id
        try:
            self.engine.add(request)
        except RequestIdInUse:
            assert sequence_id in self.requests
            return
        except InvalidRequest:
            assert sequence_id not in self.requests
            assert not self.fits(request)
            self.seen["refused as too large"] += 1
            return
        except QueueFull:
            assert self.scheduler.load().num_waiting_sequences >= self.config.max_num_waiting
            return
        assert self.fits(request)
        self.salts[sequence_id] = request.cache_salt
        self.requests[sequence_id] = request
        self.expected[sequence_id] = expected_tokens(request, vocab_size=VOCAB_SIZE)
        self.num_losses[sequence_id] = 0

    @rule()
    def schedule(self) -> None:
        self.expire()
        plan = self.engine.launch()
        for row in plan.added_rows if plan is not None else ():
            # A probe belongs to no request.
            request = self.requests.get(row.sequence_id)
            assert request is None or request.deadline is None or request.deadline > self.now
        if plan is None and not self.engine.in_flight and not self.is_lost:
            assert not self.requests, "nothing is planned and sequences are live"
        assert len(self.engine.in_flight) <= self.config.max_plans_in_flight

    @precondition(lambda self: self.engine.in_flight)
    @rule()
    def deliver(self) -> None:
        outputs = self.engine.deliver()
        self.num_delivered += len(outputs.token_ids)
        for sequence_id in outputs.sequence_ids:
            got = self.engine.outputs[sequence_id]
            assert got == self.expected[sequence_id][: len(got)]
        for sequence_id, _ in outputs.prompt_logprobs:
            self.check_reports(sequence_id)
        for sequence_id in outputs.sequence_ids:
            assert self.num_unreported(sequence_id) == 0, "a token comes before the prompt is reported"
        for finished in outputs.finished:
            self.check_finished(finished)

    @rule(several=st.lists(requests, min_size=2, max_size=6))
    def add_several(self, several: list[SequenceRequest]) -> None:
        for request in several:
            self.add(request)

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        """Plans and delivers as the step loop does."""
        for _ in range(count):
            for _ in range(self.config.max_plans_in_flight):
                self.schedule()
            if self.engine.in_flight:
                self.deliver()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence_id = data.draw(st.sampled_from(sorted(self.requests)))
        assert self.scheduler.abort(sequence_id)
        assert not self.scheduler.abort(sequence_id)
        del self.requests[sequence_id]
        self.seen["aborts"] += 1

    @rule(count=st.integers(1, 5))
    def wait(self, count: int) -> None:
        self.now += count

    def expire(self) -> None:
        """Ends sequences whose deadlines have passed, which must all be waiting."""
        before = self.scheduler.load()
        expired = self.scheduler.expire(self.now)
        after = self.scheduler.load()
        assert after.num_running_sequences == before.num_running_sequences
        assert after.num_waiting_sequences == before.num_waiting_sequences - len(expired)
        for finished in expired:
            request = self.requests.pop(finished.sequence_id)
            assert finished.reason is FinishReason.EXPIRED
            assert request.deadline is not None and request.deadline <= self.now
            self.seen["expired"] += 1

    @precondition(lambda self: any(self.engine.outputs.get(sequence_id) for sequence_id in self.requests))
    @rule(data=st.data())
    def stop_late(self, data: st.DataObject) -> None:
        candidates = sorted(s for s in self.requests if self.engine.outputs[s])
        sequence_id = data.draw(st.sampled_from(candidates))
        num_output_tokens = data.draw(st.integers(1, len(self.engine.outputs[sequence_id])))
        self.num_delivered -= len(self.engine.outputs[sequence_id]) - num_output_tokens
        assert self.scheduler.stop(sequence_id, num_output_tokens)
        assert not self.scheduler.stop(sequence_id, num_output_tokens)
        del self.requests[sequence_id]
        self.seen["late stops"] += 1

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def break_a_row(self, data: st.DataObject) -> None:
        if data.draw(st.integers(0, 3)) == 0:
            sequence_id = data.draw(st.sampled_from(sorted(self.requests)))
            self.engine.runner.faulty.add(sequence_id)
            codes = [FAULT_NAN_LOGITS, FAULT_GRAMMAR, FAULT_NO_TOKEN]
            self.engine.runner.fault_codes[sequence_id] = data.draw(st.sampled_from(codes))

    @rule(count=st.integers(8, 30))
    def run_long(self, count: int) -> None:
        self.step(count)

    @precondition(lambda self: not self.is_lost)
    @rule(
        times=st.sampled_from([0, 0, 0, 1, 1, 1, 3, 6]),
        worker=st.none() | workers(),
        is_attached_at_once=st.booleans(),
        failure=st.sampled_from(["", "a step failed"]),
    )
    def lose_worker(self, times: int, worker: WorkerInfo | None, is_attached_at_once: bool, failure: str) -> None:
        """Loses the worker: often not at all, so that other moves come in between, and sometimes repeatedly, also
        during trials.
        """
        for _ in range(times):
            if self.is_lost:
                self.attach_worker(worker)
                self.schedule()
                if self.engine.in_flight:
                    # The result is the probe's if only suspects are there.
                    self.deliver()
                    self.schedule()
            self.lose_worker_once(failure)
        if self.is_lost and is_attached_at_once:
            self.attach_worker(worker)

    def lose_worker_once(self, failure: str) -> None:
        self.seen["losses"] += 1
        self.num_losses.update(self.requests.keys())
        self.engine.lose_worker(failure)
        self.is_lost = True
        self.end_those_that_failed("lost")
        assert self.scheduler.schedule() is None

    @precondition(lambda self: self.is_lost)
    @rule(worker=st.none() | workers())
    def attach_worker(self, worker: WorkerInfo | None) -> None:
        """Attaches the same worker again, or one of another size."""
        if worker is not None:
            self.seen["other workers"] += 1
        self.engine.attach_worker(self.make_runner(worker or self.engine.runner.info))
        self.is_lost = False
        self.end_those_that_failed("fit")

    @rule()
    def reset_prefix_cache(self) -> None:
        num_cached = self.scheduler.load().num_cached_blocks
        assert self.scheduler.reset_prefix_cache() == num_cached
        assert self.scheduler.load().num_cached_blocks == 0

    @rule(prompt=prompts)
    def ask_longest_prefix(self, prompt: list[int]) -> None:
        tokens = create_request(prompt=prompt).prompt_token_ids
        load = self.scheduler.load()
        count = self.scheduler.longest_prefix(tokens)
        assert count <= len(tokens) and count % self.scheduler.load().block_size == 0
        assert self.config.enable_prefix_caching or count == 0
        assert load == self.scheduler.load()

    # Checks

    def fits(self, request: SequenceRequest) -> bool:
        worker, length = self.engine.runner.info, len(request.prompt_token_ids) + request.max_tokens
        num_slots = (worker.num_blocks - 1) * worker.block_size
        return length <= worker.max_model_len and length - 1 <= num_slots

    def check_finished(self, finished: FinishedSequence) -> None:
        """Checks an end that a result brought."""
        sequence_id = finished.sequence_id
        request, output = self.requests.pop(sequence_id), self.engine.outputs[sequence_id]
        assert finished.num_output_tokens == len(output)
        assert 0 <= finished.num_cached_tokens <= len(request.prompt_token_ids)
        assert self.config.enable_prefix_caching or finished.num_cached_tokens == 0
        if finished.reason is FinishReason.ERROR:
            self.seen["row faults"] += 1
            assert sequence_id in self.engine.runner.faulty
            self.check_fault(finished, self.engine.runner.fault_codes[sequence_id])
            self.engine.runner.faulty.discard(sequence_id)
            return
        assert output == self.expected[sequence_id]
        if output[-1] in request.stop_token_ids:
            self.seen["stop ids"] += 1
            assert (finished.reason, finished.stop_token_id) == (FinishReason.STOP, output[-1])
        else:
            assert (finished.reason, finished.stop_token_id) == (FinishReason.LENGTH, None)
            assert len(output) == request.max_tokens

    def check_fault(self, finished: FinishedSequence, code: int) -> None:
        error = finished.error or ""
        if code == FAULT_NAN_LOGITS:
            assert "row fault" in error and finished.error_field is None
        else:
            assert finished.error_field == ("structured_output" if code == FAULT_GRAMMAR else "sampling")
            assert error.endswith(f"at output token {finished.num_output_tokens + 1}")
            self.seen["faults of requests"] += 1

    def num_unreported(self, sequence_id: int) -> int:
        """How many of a sequence's prompt positions are still to be reported."""
        request = self.requests[sequence_id]
        if request.sampling.num_prompt_logprobs is None:
            return 0
        reports = self.engine.prompt_reports[sequence_id]
        return len(request.prompt_token_ids) - 1 - sum(len(report.logprobs) for report in reports)

    def check_reports(self, sequence_id: int) -> None:
        """Checks that the reports so far, put together, are the beginning of the true report."""
        reports, num_left = self.engine.prompt_reports[sequence_id], self.num_unreported(sequence_id)
        truth = expected_prompt_logprobs(self.requests[sequence_id], vocab_size=VOCAB_SIZE)
        position = 1
        for report in reports:
            assert report.first_position == position
            position += len(report.logprobs)
            self.seen["prompt reports"] += 1
        count = position - 1
        for name, each in [("logprobs", 1), ("ranks", 1), ("top_token_ids", truth.num_top)]:
            joined = [value for report in reports for value in getattr(report, name).tolist()]
            assert joined == getattr(truth, name)[: count * each].tolist()
        assert num_left >= 0
        # The engine has counted what is computed again, and reported again.
        self.seen["prompts reported in parts"] += len(reports) > 1

    def end_those_that_failed(self, word: str) -> None:
        """Notes the ends that a loss or a new worker brought."""
        for sequence_id in sorted(self.requests.keys() & self.engine.finished.keys()):
            finished, request = self.engine.finished[sequence_id], self.requests.pop(sequence_id)
            assert finished.reason is FinishReason.ERROR
            if word == "lost":
                self.seen["poisonous"] += 1
                assert self.num_losses[sequence_id] >= 2 + MAX_FAILED_TRIALS
            else:
                self.seen["outgrown"] += 1
                assert not self.fits(request)

    @invariant()
    def books_balance(self) -> None:
        self.seen["moves"] += 1
        self.scheduler.check_integrity()
        load = self.scheduler.load()
        assert self.scheduler.num_unfinished == len(self.requests)
        assert load.num_free_blocks + load.num_cached_blocks + load.num_used_blocks == load.num_total_blocks
        assert load.num_output_tokens == self.num_delivered
        assert load.num_cached_prompt_tokens <= load.num_admitted_prompt_tokens <= load.num_prompt_tokens
        assert load.num_steps_in_flight == len(self.engine.in_flight)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        if self.is_lost:
            self.attach_worker(None)
        for _ in range(5000):
            if not self.requests and not self.engine.in_flight:
                break
            self.step(1)
        assert not self.requests, "sequences never end"
        self.books_balance()
        load = self.scheduler.load()
        assert load.num_used_blocks == load.num_running_sequences == load.num_waiting_sequences == 0
        self.seen["preemptions"] += load.num_preemptions
        self.seen["prefix hits"] += load.num_cached_prompt_tokens
        self.seen["overshoots"] += load.num_overshoot_tokens
        self.seen["full hits"] += self.engine.runner.num_full_hits
