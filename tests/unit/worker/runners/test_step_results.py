"""A step's times, with events of a GPU that is not there."""

from typing import Any

import pytest
import torch

from tandem_shared.step_plan import StepTimes
from tandem_worker.runners.step_results import PendingStep, Timing
from tests.unit.worker.runners.test_exactness import make_runner
from tests.unit.worker.runners.test_torch_runner import plans


class FakeEvent:
    """What the stream comes to at a time."""

    def __init__(self, at_ms: float) -> None:
        self._at_ms = at_ms

    def synchronize(self) -> None: ...

    def elapsed_time(self, after: "FakeEvent") -> float:
        return after._at_ms - self._at_ms


def times_of(*events: Any) -> StepTimes:
    """events: started, ended, previous_ended."""
    return PendingStep(1, [0], torch.tensor([5]), Timing(7, *events)).wait().times


def test_gpu_times_are_between_events() -> None:
    times = times_of(FakeEvent(10.0125), FakeEvent(12.5), FakeEvent(10.0))
    assert (times.prepared_ns, times.gpu_duration_ns, times.gpu_idle_ns) == (7, 2_487_500, 12_500)


def test_a_first_step_has_not_idled_and_a_cpu_has_no_gpu_times() -> None:
    times = times_of(FakeEvent(10.0), FakeEvent(12.5))
    assert (times.gpu_duration_ns, times.gpu_idle_ns) == (2_500_000, 0)
    times = times_of()
    assert (times.gpu_duration_ns, times.gpu_idle_ns) == (0, 0)


def test_a_runner_s_steps_idle_since_the_step_before_of_their_session(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner("embedded")
    clock = iter(map(FakeEvent, [1.0, 2.0, 2.5, 4.0, 7.0, 8.0]))
    monkeypatch.setattr(runner, "_record_event", lambda: next(clock))
    first, second, *_ = plans(200)
    pending = [runner.execute(first), runner.execute(second)]
    runner.reset()
    pending.append(runner.execute(first))
    assert [step.wait().times.gpu_idle_ns for step in pending] == [0, 500_000, 0]
