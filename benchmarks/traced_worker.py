"""A worker service that records the times of each step of a session, and writes them to a file when the session ends.

Usage: python -m benchmarks.traced_worker TRACE_JSONL [FLAGS OF tandem-worker]

Each line of the file is a TracedStep. Tracing adds two readings of the clock and two list entries to a step, and four
readings more where rows have grammars.
"""

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tandem.internal.v1 import worker_pb2
from tandem_shared.config import WorkerSettings, read_command_line
from tandem_shared.host.log import configure_logging
from tandem_shared.step_plan import StepPlan, WorkerInfo
from tandem_worker.runners.grammar_rows import GrammarRows
from tandem_worker.runners.runner import PendingStep, Runner
from tandem_worker.service.process import run
from tandem_worker.service.servicer import Context, WorkerServicer

T = TypeVar("T")


@dataclass(frozen=True)
class TracedStep:
    """Unix times and durations in nanoseconds. Fields that StepTimes also has are taken from it."""

    step_id: int
    num_chunk_tokens: int
    """Prompt tokens; the step's other tokens are those of decoding rows."""
    num_sampled: int
    received_ns: int
    begun_ns: int
    """When the launcher thread took the plan."""
    prepared_ns: int
    queued_ns: int
    """When the whole step was on the GPU's queue or, on a CPU, computed."""
    sampled_ns: int
    sent_ns: int
    gpu_duration_ns: int
    gpu_idle_ns: int
    grammars_duration_ns: int
    """The launcher thread's time with the rows' grammars: moving them on by the tokens of the step before, and masks"""


@dataclass(frozen=True)
class Launch:
    """What the trace says of a step beyond its result."""

    num_chunk_tokens: int
    begun_ns: int
    queued_ns: int
    grammars_duration_ns: int


class Stopwatch:
    """The time that has been spent in some functions."""

    def __init__(self) -> None:
        self._spent_ns = 0

    def watch(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function, which does what it did, with its time counted."""

        @functools.wraps(function)
        def watched(*args: Any, **keywords: Any) -> T:
            started = time.perf_counter_ns()
            try:
                return function(*args, **keywords)
            finally:
                self._spent_ns += time.perf_counter_ns() - started

        return watched

    def take(self) -> int:
        """The nanoseconds since the last call."""
        spent, self._spent_ns = self._spent_ns, 0
        return spent


class TracedRunner:
    """A Runner that passes calls to another one and notes their times. The stopwatch has those of the grammars."""

    def __init__(self, runner: Runner, stopwatch: Stopwatch) -> None:
        self._runner = runner
        self._stopwatch = stopwatch
        self.launches: list[Launch] = []

    @property
    def progress(self) -> int:
        return self._runner.progress

    @property
    def info(self) -> WorkerInfo:
        return self._runner.info

    def execute(self, plan: StepPlan) -> PendingStep:
        begun_ns = time.time_ns()
        pending = self._runner.execute(plan)
        num_chunk_tokens = int(plan.chunk_num_tokens.sum())
        self.launches.append(Launch(num_chunk_tokens, begun_ns, time.time_ns(), self._stopwatch.take()))
        return pending

    def reset(self) -> None:
        self._runner.reset()
        self.launches.clear()

    def close(self) -> None:
        self._runner.close()


class TracedServicer(WorkerServicer):
    """A servicer that keeps its results, and writes the trace when the session ends."""

    def __init__(self, runner: Runner, trace: Path, stopwatch: Stopwatch, **options: Any) -> None:
        self._traced = TracedRunner(runner, stopwatch)
        self._trace = trace
        super().__init__(self._traced, **options)

    async def ExecuteSteps(
        self, request_iterator: AsyncIterator[worker_pb2.ExecuteStepsRequest], context: Context
    ) -> AsyncIterator[worker_pb2.ExecuteStepsResponse]:
        results: list[worker_pb2.StepResult] = []
        try:
            async with contextlib.aclosing(super().ExecuteSteps(request_iterator, context)) as responses:
                async for response in responses:
                    if response.WhichOneof("kind") == "result":
                        results.append(response.result)
                    yield response
        finally:
            write_trace(self._trace, results, self._traced.launches)


def write_trace(path: Path, results: list[worker_pb2.StepResult], launches: list[Launch]) -> None:
    """Writes a line for each step that has a result. results, launches: in order, from the session's first step."""
    with path.open("w") as file:
        for result, launch in zip(results, launches, strict=False):
            step = TracedStep(
                step_id=result.step_id,
                num_sampled=len(result.num_token_ids),
                **dataclasses.asdict(launch),
                **{name: getattr(result.times, name) for name in result.times.DESCRIPTOR.fields_by_name},
            )
            file.write(json.dumps(dataclasses.asdict(step)) + "\n")


def read_trace(path: Path) -> list[TracedStep]:
    return [TracedStep(**json.loads(line)) for line in path.read_text().splitlines()]


def main() -> None:
    trace, flags = Path(sys.argv[1]), sys.argv[2:]
    settings = read_command_line(WorkerSettings, "traced_worker", "tandem-worker, with a trace of its steps.", flags)
    configure_logging(settings.log_level)
    stopwatch = Stopwatch()
    for method in (GrammarRows.masks, GrammarRows.accept):
        setattr(GrammarRows, method.__name__, stopwatch.watch(method))
    run(settings, lambda runner, **options: TracedServicer(runner, trace, stopwatch, **options))


if __name__ == "__main__":
    main()
