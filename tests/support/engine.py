"""The scheduler core and a Runner in one thread, with no service in between. Knows only the Runner protocol."""

from collections import deque
from collections.abc import Iterable

from tandem_scheduler.core.interface import SchedulerInterface
from tandem_scheduler.core.types import FinishedSequence, SequenceRequest, StepOutputs
from tandem_shared.step_plan import PromptLogprobs, StepPlan
from tandem_worker.runners.runner import PendingStep, Runner


class Engine:
    """Launches plans and delivers their results one by one, so that a test chooses the interleaving."""

    def __init__(self, scheduler: SchedulerInterface, runner: Runner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.in_flight: deque[PendingStep] = deque()
        self.outputs: dict[int, list[int]] = {}
        self.finished: dict[int, FinishedSequence] = {}
        self.prompt_reports: dict[int, list[PromptLogprobs]] = {}

    def add(self, *requests: SequenceRequest) -> None:
        for request in requests:
            self.scheduler.add(request)
            self.outputs[request.sequence_id] = []
            self.prompt_reports[request.sequence_id] = []
            self.finished.pop(request.sequence_id, None)

    def launch(self) -> StepPlan | None:
        """Plans one step and gives it to the runner."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.in_flight.append(self.runner.execute(plan))
        return plan

    def deliver(self) -> StepOutputs:
        """Gives the oldest step's result to the scheduler."""
        outputs = self.scheduler.update(self.in_flight.popleft().wait())
        for sequence_id, token_id in zip(outputs.sequence_ids, outputs.token_ids, strict=True):
            self.outputs[sequence_id].append(token_id)
        for sequence_id, report in outputs.prompt_logprobs:
            self.prompt_reports[sequence_id].append(report)
        for finished in outputs.finished:
            self.finished[finished.sequence_id] = finished
        return outputs

    def lose_worker(self, failure: str = "") -> None:
        """Loses the runner and the steps in flight."""
        self.in_flight.clear()
        for finished in self.scheduler.lose_worker(failure):
            self.finished[finished.sequence_id] = finished

    def attach_worker(self, runner: Runner) -> None:
        """Attaches another runner, whose batch is empty."""
        self.runner = runner
        runner.reset()
        for finished in self.scheduler.attach_worker(runner.info):
            self.finished[finished.sequence_id] = finished

    def step(self) -> None:
        """Keeps as many plans in flight as the scheduler wants, then takes one result."""
        while self.launch() is not None:
            pass
        assert self.in_flight, "nothing is in flight and nothing can be planned"
        self.deliver()

    def drain(self, max_steps: int = 1_000_000) -> None:
        """Runs until every sequence has ended and no step is in flight."""
        for _ in range(max_steps):
            if not self.scheduler.num_unfinished and not self.in_flight:
                return
            self.step() if self.scheduler.num_unfinished else self.deliver()
        raise AssertionError(f"{self.scheduler.num_unfinished} sequences have not ended in {max_steps} steps")


def run(scheduler: SchedulerInterface, runner: Runner, requests: Iterable[SequenceRequest]) -> dict[int, list[int]]:
    """Runs requests to their ends; gives each sequence's output tokens."""
    engine = Engine(scheduler, runner)
    engine.add(*requests)
    engine.drain()
    return engine.outputs
