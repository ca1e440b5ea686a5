"""The worker's own metrics, compared with the results that it sent."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.internal.v1 import worker_pb2
from tandem_shared.metrics.exposition import encode
from tandem_shared.step_plan import StepPlan, StepResult, StepTimes
from tandem_worker.service.metrics import WORKER_METRICS
from tests.contract.services import wait_until
from tests.contract.worker_service import Worker, prompt_plan, read_result, send
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner
from tests.support.metrics import Scrape


class GpuRunner(FakeRunner):
    """Says of step N that it took N ms on a GPU that had idled for 100 us before, and ended in 2100, N seconds after
    the beginning of the year.
    """

    def execute(self, plan: StepPlan) -> Any:
        pending, step_id = super().execute(plan), plan.step_id

        def wait() -> StepResult:
            times = StepTimes(
                sampled_ns=4_102_444_800 * 10**9 + step_id * 10**9,
                gpu_duration_ns=step_id * 10**6,
                gpu_idle_ns=10**5,
            )
            return dataclasses.replace(pending.wait(), times=times)

        return SimpleNamespace(wait=wait)


def scrape(worker: Worker, prefix: str = "tandem:") -> Scrape:
    return Scrape(encode(worker.servicer.read_metrics(prefix))[0].decode(), prefix)


async def test_steps_and_sessions() -> None:
    worker = Worker(GpuRunner(worker_info(model="fake", num_blocks=33)))
    await worker.start()
    try:
        before = scrape(worker)
        assert before["worker_session_open"] == before["worker_sessions_total"] == before["worker_tokens_total"] == 0
        call = await worker.open()
        results: list[worker_pb2.StepResult] = []
        for plan in (prompt_plan(1), StepPlan(2), StepPlan(3)):
            await send(call, plan)
            results.append(await read_result(call))
        found = scrape(worker)
        assert {f"tandem:{metric.name}" for metric in WORKER_METRICS} == found.families.keys()
        assert (found["worker_sessions_total"], found["worker_session_open"], found["worker_kv_blocks"]) == (1, 1, 32)
        assert found["worker_plans_waiting"] == 0 and found["worker_tokens_total"] == 3
        # A step ends a second after the one before; the first began when its plan came.
        first_s = (results[0].times.sampled_ns - results[0].times.received_ns) / 1e9
        assert found["worker_step_time_seconds_count"] == 3
        assert found["worker_step_time_seconds_sum"] == pytest.approx(first_s + 2)
        assert found["worker_gpu_time_seconds_total"] == pytest.approx(0.006)
        # Before the first step there was nothing to do.
        assert found["worker_gpu_idle_seconds_total"] == pytest.approx(0.0002)
        assert found.values("worker_info", "model_name") == {"fake": 1}
        call.cancel()

        async def is_closed() -> bool:
            return scrape(worker)["worker_session_open"] == 0

        await wait_until(is_closed, "the session has ended")
        assert scrape(worker, "vllm:")["worker_tokens_total"] == 3
    finally:
        await worker.stop()
