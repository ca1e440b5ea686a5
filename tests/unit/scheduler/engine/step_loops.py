"""Step loops with a worker in the same process, whose failures come at chosen moments."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from tandem_scheduler.core.types import FinishedSequence, SchedulerConfig, StepOutputs
from tandem_scheduler.engine.hub import EngineHub
from tandem_scheduler.engine.step_loop import Sink, StepLoop
from tandem_shared.errors import WorkerUnavailable
from tandem_shared.step_codec import encode_plan
from tandem_shared.step_plan import StepPlan, StepResult, StepTimes, WorkerInfo
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner


class FlakySession:
    """Runs plans at once. After `num_sends` plans, sending fails; results of earlier plans still come."""

    def __init__(self, info: WorkerInfo, num_sends: int | None, times: dict[int, StepTimes]) -> None:
        self.info = info
        self.heard_at = 0.0
        self.chunks: list[int] = []
        self._runner = FakeRunner(self.info)
        self._times = times
        self._num_sends = num_sends
        self._results: asyncio.Queue[StepResult] = asyncio.Queue()

    async def send(self, plan: StepPlan) -> int:
        await asyncio.sleep(0)
        if self._num_sends is not None and plan.step_id > self._num_sends:
            raise WorkerUnavailable("broken pipe")
        self.chunks.append(int(plan.chunk_num_tokens.sum()))
        result = self._runner.execute(plan).wait()
        self._results.put_nowait(replace(result, times=self._times.get(plan.step_id, StepTimes())))
        return encode_plan(plan).ByteSize()

    async def results(self) -> AsyncIterator[StepResult]:
        while True:
            yield await self._results.get()

    async def close(self) -> None:
        pass


class FlakyClient:
    """A client whose sessions last for so many plans each, and the last one for ever."""

    address = "worker:50052"

    def __init__(self, sends: Sequence[int] = (), info: WorkerInfo | None = None) -> None:
        self.info = info or worker_info()
        self._sends: list[int | None] = [*sends, None]
        self.sessions: list[FlakySession] = []
        # By step id, what results of each session say of the time.
        self.times: dict[int, StepTimes] = {}

    async def get_info(self, timeout_s: float) -> WorkerInfo:
        return self.info

    async def open_session(
        self, info: WorkerInfo, scheduler_id: str, epoch: int, num_live_sequences: int
    ) -> FlakySession:
        self.sessions.append(FlakySession(info, self._sends.pop(0), self.times))
        return self.sessions[-1]

    async def close(self) -> None:
        pass


class Collector:
    """A sink that keeps each sequence's tokens."""

    def __init__(self, num_sequences: int) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.all_ended = asyncio.Event()
        self._num_left = num_sequences

    def on_outputs(self, outputs: StepOutputs) -> None:
        for sequence_id, token_id in zip(outputs.sequence_ids, outputs.token_ids, strict=True):
            self.tokens.setdefault(sequence_id, []).append(token_id)
        self.on_finished(outputs.finished)

    def on_finished(self, finished: list[FinishedSequence]) -> None:
        self._num_left -= len(finished)
        if not self._num_left:
            self.all_ended.set()

    def on_worker_gone(self, error: WorkerUnavailable) -> None:
        raise AssertionError(error)

    async def on_readiness(self, is_ready: bool) -> None:
        pass


@asynccontextmanager
async def running_loop(
    client: FlakyClient, sink: Sink, config: SchedulerConfig | None = None, **options: Any
) -> AsyncIterator[StepLoop]:
    """A step loop that has its worker and runs. options: those of StepLoop that a test cares for."""
    defaults = {"scheduler_id": "test", "worker_wait_s": 10, "step_timeout_s": 10}
    step_loop = StepLoop(client, config or SchedulerConfig(), sink, **defaults | options)
    if isinstance(sink, EngineHub):
        sink.connect(step_loop)
    running = asyncio.create_task(step_loop.run())
    try:
        async with asyncio.timeout(10):
            while not step_loop.is_connected:
                await asyncio.sleep(0)
        yield step_loop
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
