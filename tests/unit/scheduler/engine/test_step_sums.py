"""Sums of step times, compared with the moments at which a simulated worker was busy."""

from hypothesis import given
from hypothesis import strategies as st

from tandem_scheduler.core.types import SchedulerConfig
from tandem_scheduler.engine.step_sums import StepMeter, StepSums
from tandem_shared.step_plan import StepTimes
from tests.support.builders import create_requests
from tests.unit.scheduler.engine.step_loops import Collector, FlakyClient, running_loop

# For each step: how long after the step before its plan came, and how long it took.
STEPS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=12)
LONG = 10**9


@given(STEPS, st.integers(1, 10**18))
def test_step_times_add_up_to_the_time_in_which_there_was_a_step(steps: list[tuple[int, int]], epoch: int) -> None:
    meter = StepMeter()
    received = ended = epoch
    busy: set[int] = set()
    for since_last, duration in steps:
        received += since_last
        ended = max(received, ended) + duration
        busy.update(range(max(received, ended - duration), ended))
        meter.note(StepTimes(received_ns=received, sampled_ns=ended), LONG, is_queued=False)
    assert (meter.sums.num_step_results, meter.sums.step_time_ns) == (len(steps), len(busy))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=9))
def test_gaps_count_where_the_gpu_had_a_plan(steps: list[tuple[int, int, bool]]) -> None:
    meter = StepMeter()
    for duration, idle, is_queued in steps:
        meter.note(StepTimes(gpu_duration_ns=duration, gpu_idle_ns=idle), LONG, is_queued=is_queued)
    gaps = sum(idle for _, idle, is_queued in steps if is_queued)
    assert meter.sums == StepSums(len(steps), 0, sum(duration for duration, _, _ in steps), gaps)


@given(st.lists(st.tuples(st.builds(StepTimes, *[st.integers(0, 2**64 - 1)] * 6), st.integers(0, 100))))
def test_a_clock_that_is_set_counts_for_no_more_than_the_time_that_passed_here(steps: list) -> None:
    meter = StepMeter()
    for times, round_trip_ns in steps:
        meter.note(times, round_trip_ns, is_queued=True)
    most = sum(round_trip_ns for _, round_trip_ns in steps)
    for value in (meter.sums.step_time_ns, meter.sums.gpu_time_ns, meter.sums.gpu_gap_ns):
        assert 0 <= value <= most


def test_another_worker_has_another_clock() -> None:
    meter = StepMeter()
    meter.note(StepTimes(received_ns=5000, sampled_ns=5007), LONG, is_queued=False)
    meter.start_session()
    meter.note(StepTimes(received_ns=100, sampled_ns=104), LONG, is_queued=False)
    assert meter.sums.step_time_ns == 7 + 4


async def test_sums_go_on_after_a_loss_of_the_worker() -> None:
    client, sink, requests = FlakyClient([5]), Collector(2), create_requests(2, max_tokens=25)
    client.times = {step_id: StepTimes(received_ns=10 * step_id, sampled_ns=10 * step_id + 3) for step_id in range(99)}
    async with running_loop(client, sink, SchedulerConfig(max_plans_in_flight=1)) as step_loop:
        step_loop.submit(requests)
        await sink.all_ended.wait()
        assert step_loop.scheduler is not None
        num_results = step_loop.step_sums.num_step_results
        # The plan that could not be sent has no result.
        assert len(client.sessions) == 2 and num_results == step_loop.scheduler.load().num_steps - 1 > 5
        assert step_loop.step_sums.step_time_ns == 3 * num_results
