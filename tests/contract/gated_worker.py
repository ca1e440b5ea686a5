"""A fake worker whose results come when a test lets them."""

import threading

from tests.contract.services import Services, model_info
from tests.support.fake_worker import FakeRunner

MANY = 100_000
"""More results than any test takes."""


def gated_runner(number: int, permits: int = 0, **changes: object) -> FakeRunner:
    """A worker that gives so many results and then none, until its gate is opened."""
    info = model_info(worker_instance_id=f"worker-{number}", **changes)
    return FakeRunner(info, gate=threading.Semaphore(permits))


def open_gate(runner: object, permits: int = MANY) -> None:
    assert isinstance(runner, FakeRunner) and runner.gate is not None
    runner.gate.release(permits)


async def kill_worker(services: Services) -> None:
    """Stops the worker for good, and waits until the scheduler has noticed."""
    losses = (await services.load()).num_worker_losses
    runner = services.runner
    await services.stop_worker()
    await services.wait_load(lambda load: load.num_worker_losses == losses + 1, "the loss is noticed")
    open_gate(runner)
