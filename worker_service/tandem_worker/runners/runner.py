"""The interface between the worker's servicer and what executes its plans. Knows no torch, so a fake can stand in."""

from typing import Protocol

from tandem_shared.step_plan import StepPlan, StepResult, WorkerInfo


class PendingStep(Protocol):
    """A step whose work is queued on the device."""

    def wait(self) -> StepResult:
        """Blocks until the step's tokens are on the host. Called once, in the order of the steps."""


class Runner(Protocol):
    """Executes plans. execute comes from one thread, PendingStep.wait from another, reset while neither runs."""

    @property
    def info(self) -> WorkerInfo: ...

    @property
    def progress(self) -> int:
        """A number that rises while an unfinished step makes progress. May be read from any thread."""

    def execute(self, plan: StepPlan) -> PendingStep:
        """Applies a plan to the batch and queues its forward pass.

        Raises InvalidPlan, with nothing applied, where the batch cannot follow the plan.
        """

    def reset(self) -> None:
        """Empties the batch, for a new session; the next plan's step_id is 1."""

    def close(self) -> None:
        """Waits for the device, and releases what keeps a process group from ending. Nothing is called after it."""
