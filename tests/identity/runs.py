"""Runs of requests through the real scheduler core and the real runner, and how runs are compared."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import Load, SchedulerConfig, SequenceRequest, StepOutputs
from tandem_shared.config import WorkerSettings
from tandem_shared.step_plan import PromptLogprobs, RowLogprobs, StepPlan
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.runners.runner import PendingStep, Runner
from tandem_worker.startup import build_runner
from tests.identity.requests import NUM_REQUESTS
from tests.support.engine import Engine

MAX_NUM_BATCHED_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """One way to run the requests. The default is the base run, from which the truth is taken."""

    batch: int = 1
    prefix_caching: bool = False
    chunk: int | None = None
    preempted: bool = False
    depth: int = 1
    block_size: int = 16

    def __str__(self) -> str:
        return (
            f"batch{self.batch}-{'cache' if self.prefix_caching else 'nocache'}-chunk{self.chunk or 'whole'}-"
            f"{'preempted' if self.preempted else 'roomy'}-depth{self.depth}-block{self.block_size}"
        )


class CountingRunner:
    """The real runner, with a count of the rows added to it: all but one for each request are resumes."""

    def __init__(self, runner: Runner) -> None:
        self.info = runner.info
        self.reset = runner.reset
        self.num_added = 0
        self._runner = runner

    def execute(self, plan: StepPlan) -> PendingStep:
        self.num_added += len(plan.added_rows)
        return self._runner.execute(plan)


@dataclass
class Run:
    """What requests were told, by sequence id, the scheduler's counts, and the number of resumes."""

    outputs: dict[int, list[int]]
    logprobs: dict[int, list[RowLogprobs]]
    prompt_logprobs: dict[int, list[PromptLogprobs]]
    load: Load
    num_resumes: int


class ReportingEngine(Engine):
    """Keeps the log-probabilities that a scheduler gives out."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        super().__init__(scheduler, runner)
        self.logprobs: dict[int, list[RowLogprobs]] = defaultdict(list)
        self.prompt_logprobs: dict[int, list[PromptLogprobs]] = defaultdict(list)

    def deliver(self) -> StepOutputs:
        outputs = super().deliver()
        for sequence_id, report in outputs.logprobs.items():
            self.logprobs[sequence_id].append(report)
        for sequence_id, reports in outputs.prompt_logprobs:
            self.prompt_logprobs[sequence_id].append(reports)
        return outputs


def execute(folder: Path, case: Case, requests: list[SequenceRequest], communicator: Communicator | None = None) -> Run:
    """Runs the requests, case.batch at a time: the next ones are added when the ones before have ended. communicator:
    that of a tensor-parallel rank, each of which makes the same plans for itself.
    """
    num_pool_tokens = 1536 if case.preempted else 256 * 2 * NUM_REQUESTS
    runner = CountingRunner(make_runner(folder, case.block_size, num_pool_tokens // case.block_size + 1, communicator))
    config = SchedulerConfig(
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_chunk_tokens=case.chunk,
        max_plans_in_flight=case.depth,
        enable_prefix_caching=case.prefix_caching,
    )
    scheduler = Scheduler(config, runner.info)
    engine = ReportingEngine(scheduler, runner)
    for start in range(0, len(requests), case.batch):
        engine.add(*requests[start : start + case.batch])
        engine.drain()
    scheduler.check_integrity()
    num_resumes = runner.num_added - len(requests)
    return Run(engine.outputs, engine.logprobs, engine.prompt_logprobs, scheduler.load(), num_resumes)


def make_runner(folder: Path, block_size: int, num_blocks: int, communicator: Communicator | None = None) -> Runner:
    settings = WorkerSettings(
        model=str(folder),
        dtype="float64",
        device="cpu",
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        num_threads=1,
    )
    return build_runner(settings, communicator)


def prompt_reports(parts: list[PromptLogprobs]) -> list[RowLogprobs]:
    """A report for each position of a prompt but the first, of parts that must be in order and without a gap."""
    reports = []
    for part in parts:
        assert part.first_position == len(reports) + 1
        for index, (logprob, rank) in enumerate(zip(part.logprobs, part.ranks, strict=True)):
            top = slice(index * part.num_top, (index + 1) * part.num_top)
            reports.append(RowLogprobs(0, logprob, part.top_token_ids[top], part.top_logprobs[top], rank))
    return reports


def assert_equal_reports(found: list[RowLogprobs], expected: list[RowLogprobs]) -> None:
    """Log-probabilities may differ in the last bit of float32, as sums of float64 may in theirs."""
    assert list(map(_ids, found)) == list(map(_ids, expected))
    numbers = [[number for report in each for number in _numbers(report)] for each in (found, expected)]
    np.testing.assert_allclose(*numbers, rtol=1e-6, atol=1e-6)


def _ids(report: RowLogprobs) -> tuple[int, ...]:
    return (report.rank, len(report.requested_logprobs), *report.top_token_ids)


def _numbers(report: RowLogprobs) -> tuple[float, ...]:
    return (report.logprob, *report.top_logprobs, *report.requested_logprobs)


def assert_equal_runs(found: Run, expected: Run) -> None:
    assert found.outputs == expected.outputs
    assert found.logprobs.keys() == expected.logprobs.keys()
    for key, reports in expected.logprobs.items():
        assert_equal_reports(found.logprobs[key], reports)
    assert found.prompt_logprobs.keys() == expected.prompt_logprobs.keys()
    for key, parts in expected.prompt_logprobs.items():
        assert_equal_reports(prompt_reports(found.prompt_logprobs[key]), prompt_reports(parts))
