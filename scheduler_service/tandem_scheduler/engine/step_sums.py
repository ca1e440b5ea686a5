"""How long a worker's steps took, summed up, so that whoever asks twice knows the mean between. Knows no clock."""

from dataclasses import dataclass

from tandem_shared.step_plan import StepTimes


@dataclass(slots=True)
class StepSums:
    """Sums over all steps whose results came; control.proto says what they mean."""

    num_step_results: int = 0
    step_time_ns: int = 0
    gpu_time_ns: int = 0
    gpu_gap_ns: int = 0


class StepMeter:
    """Adds up the times that a worker sends with its results.

    Plans run one after the other, but a worker has several of them, so a plan also waits: a step's own time begins when
    the step before it ends. All times of a worker are by its own clock, so they are compared with each other alone.
    That clock may be set while a step runs, so no step counts for more than the time that passed here between its plan
    and its result.
    """

    def __init__(self) -> None:
        self.sums = StepSums()
        self._last_sampled_ns = 0

    def start_session(self) -> None:
        """What comes next is by another worker's clock."""
        self._last_sampled_ns = 0

    def note(self, times: StepTimes, round_trip_ns: int, *, is_queued: bool) -> int:
        """Adds a step, and returns the nanoseconds that it took. round_trip_ns: the time between its plan and its
        result here. is_queued: another plan was under way when this one was made, so the GPU had no reason to idle
        before it.
        """
        sums = self.sums
        sums.num_step_results += 1
        started_ns = max(times.received_ns, self._last_sampled_ns)
        self._last_sampled_ns = times.sampled_ns
        step_ns = min(max(times.sampled_ns - started_ns, 0), round_trip_ns)
        sums.step_time_ns += step_ns
        sums.gpu_time_ns += min(times.gpu_duration_ns, round_trip_ns)
        if is_queued:
            sums.gpu_gap_ns += min(times.gpu_idle_ns, round_trip_ns)
        return step_ns
