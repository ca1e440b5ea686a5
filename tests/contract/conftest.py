"""Services that several contract tests start."""

from collections.abc import AsyncIterator

import pytest

from tests.contract.worker_service import Worker
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker(FakeRunner(worker_info(num_blocks=4000, max_model_len=50_000, max_num_batched_tokens=50_000)))
    await worker.start()
    yield worker
    await worker.stop()
