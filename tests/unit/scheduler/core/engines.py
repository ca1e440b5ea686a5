"""Short ways to run the scheduler core on a fake worker."""

from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import SchedulerConfig, SequenceRequest
from tandem_shared.step_plan import StepPlan, WorkerInfo
from tests.support.engine import Engine
from tests.support.fake_worker import FakeRunner, expected_tokens


def make_engine(worker: WorkerInfo | None = None, **config: object) -> Engine:
    runner = FakeRunner(worker)
    return Engine(Scheduler(SchedulerConfig(**config), runner.info), runner)  # type: ignore[arg-type]


def launch(engine: Engine) -> StepPlan:
    plan = engine.launch()
    assert plan is not None
    return plan


def added_ids(plan: StepPlan) -> list[int]:
    return [row.sequence_id for row in plan.added_rows]


def chunks(plan: StepPlan) -> dict[int, int]:
    return dict(zip(plan.chunk_rows.tolist(), plan.chunk_num_tokens.tolist(), strict=True))


def expected(requests: list[SequenceRequest]) -> dict[int, list[int]]:
    return {request.sequence_id: expected_tokens(request) for request in requests}
