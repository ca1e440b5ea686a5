"""What the scheduler costs in CPU time a step, with a worker that answers at once.

All sequences decode in steady state, with prefix caching on. For each part the thread's CPU time is measured: schedule,
encode (to protobuf bytes), decode (of the result's bytes) and update. The worker's part is not timed. What the metrics
cost in each step is measured beside that, and is not in the total: metrics if the same sequences get tokens in all
steps, and changing if in each step another sequence gets none.
Writes benchmarks/results/scheduler_cpu.json.
"""

import argparse
import json
import time
from collections import deque
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, header, modelless_worker, write_json
from tandem.internal.v1 import worker_pb2
from tandem.latency import percentiles
from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import SchedulerConfig, SequenceRequest, StepOutputs
from tandem_scheduler.engine.observer import PlanMade, PlanSent, StepDone, all_of, guarded
from tandem_scheduler.engine_interface import FrontEndStats
from tandem_scheduler.front_end.token_times import TokenTimes
from tandem_scheduler.observers.metrics import SchedulerMetrics
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_codec import decode_result, encode_plan, encode_result
from tandem_shared.step_plan import StepPlan, StepResult

PARTS = ("schedule", "encode", "decode", "update")
METRICS = ("metrics", "changing")
NUM_STEPS = 2000
NUM_WARM_UP_STEPS = 100
PROMPT_LEN = 32
BLOCK_SIZE = 16
VOCAB_SIZE = 151_936


def make_scheduler(num_sequences: int, max_plans_in_flight: int) -> Scheduler:
    # More tokens than any sequence gets, so that none ends.
    max_tokens = NUM_STEPS + 10 * NUM_WARM_UP_STEPS
    max_model_len = PROMPT_LEN + BLOCK_SIZE + max_tokens
    worker = modelless_worker(
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        num_blocks=num_sequences * (max_model_len // BLOCK_SIZE + 2),
        block_size=BLOCK_SIZE,
        max_num_rows=num_sequences,
    )
    config = SchedulerConfig(
        max_num_seqs=num_sequences, max_num_batched_tokens=8192, max_plans_in_flight=max_plans_in_flight
    )
    scheduler = Scheduler(config, worker)
    rng = np.random.default_rng(0)
    for index in range(num_sequences):
        # Different lengths, so that not all rows need a new block in the same step.
        prompt = rng.integers(0, VOCAB_SIZE, PROMPT_LEN + index % BLOCK_SIZE).astype(np.int32)
        sampling = RowSampling(temperature=0.6, top_k=20, top_p=0.95, seed=index)
        scheduler.add(SequenceRequest(index, prompt, max_tokens, sampling, frozenset({VOCAB_SIZE})))
    return scheduler


class InstantWorker:
    """A worker that answers with random ids, and knows only which rows of a plan sample."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(1)
        self._left: dict[int, int] = {}
        self.num_decoding = 0

    def execute(self, plan: StepPlan) -> bytes:
        assert not len(plan.removed_rows), "steady state has no removals"
        for row in plan.added_rows:
            self._left[row.row] = len(row.token_ids) - row.num_computed_tokens
        for row, count in zip(plan.chunk_rows.tolist(), plan.chunk_num_tokens.tolist(), strict=True):
            self._left[row] -= count
            self.num_decoding += self._left[row] == 0
        token_ids = self._rng.integers(0, VOCAB_SIZE, self.num_decoding).tolist()
        result = StepResult(plan.step_id, [1] * self.num_decoding, token_ids)
        return encode_result(result).SerializeToString()


class Observed:
    """What a step's metrics need: the engine's events, guarded as in the step loop, and a front end's token times."""

    def __init__(self) -> None:
        self._observe = guarded(all_of(SchedulerMetrics().tell))
        self._times, self._stats = TokenTimes(), FrontEndStats()

    def step(self, made: PlanMade, result: StepResult, outputs: StepOutputs, handles: list[int]) -> None:
        self._observe(made)
        self._observe(PlanSent(made, 10))
        now = time.monotonic()
        self._times.note(handles, now, range(len(handles) + 1), self._stats.token_gaps)
        self._observe(StepDone(made, result, outputs, now, 0.001))


def measure(num_sequences: int, max_plans_in_flight: int) -> dict[str, object]:
    """CPU time of each part of NUM_STEPS steps, in microseconds."""
    scheduler = make_scheduler(num_sequences, max_plans_in_flight)
    worker = InstantWorker()
    in_flight: deque[bytes] = deque()
    times: dict[str, list[int]] = {part: [] for part in (*PARTS, *METRICS)}
    clock = time.thread_time_ns
    observed, changing = Observed(), Observed()

    def step() -> None:
        start = clock()
        plan = scheduler.schedule()
        scheduled = clock()
        assert plan is not None
        encode_plan(plan).SerializeToString()
        encoded = clock()
        made = PlanMade(plan, 0, num_sequences, 0, max_plans_in_flight, time.monotonic())
        in_flight.append(worker.execute(plan))
        times["schedule"].append(scheduled - start)
        times["encode"].append(encoded - scheduled)
        if len(in_flight) < max_plans_in_flight:
            return
        data = in_flight.popleft()
        start = clock()
        result = decode_result(worker_pb2.StepResult.FromString(data))
        decoded = clock()
        outputs = scheduler.update(result)
        updated = clock()
        times["decode"].append(decoded - start)
        times["update"].append(updated - decoded)
        left_out = plan.step_id % num_sequences
        for part, each, handles in (
            ("metrics", observed, list(outputs.sequence_ids)),
            ("changing", changing, outputs.sequence_ids[:left_out] + outputs.sequence_ids[left_out + 1 :]),
        ):
            start = clock()
            each.step(made, result, outputs, handles)
            times[part].append(clock() - start)

    while worker.num_decoding < num_sequences:
        step()
    for _ in range(NUM_WARM_UP_STEPS):
        step()
    for part_times in times.values():
        part_times.clear()
    for _ in range(NUM_STEPS):
        step()
    load = scheduler.load()
    assert load.num_running_sequences == num_sequences and load.num_preemptions == 0
    parts = {part: np.array(values) / 1000 for part, values in times.items()}
    report: dict[str, object] = {part: percentiles(values, 1) for part, values in parts.items()}
    return report | {"total": percentiles(np.sum([parts[part] for part in PARTS], axis=0), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-sequences", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--max-plans-in-flight", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "scheduler_cpu.json")
    arguments = parser.parse_args()
    report = header("thread CPU time of the scheduler a decode step, microseconds") | {
        "num_steps": NUM_STEPS,
        "block_size_tokens": BLOCK_SIZE,
        "max_plans_in_flight": arguments.max_plans_in_flight,
        "by_num_sequences": {},
    }
    for num_sequences in arguments.num_sequences:
        measured = measure(num_sequences, arguments.max_plans_in_flight)
        report["by_num_sequences"][num_sequences] = measured
        print(num_sequences, json.dumps(measured))
    write_json(arguments.output, report)


if __name__ == "__main__":
    main()
