"""A worker service without a model, whose steps take a fixed time.

`python -m tests.chaos.support.fake_service STEP_MS MAX_ROWS STARTS FLAGS` serves the fake runner, which fails where a
plan breaks the rules. STARTS is a file that gets a line for each row that a plan adds: when it was added
(time.monotonic()) and the first two tokens of its prompt.
"""

import asyncio
import sys
import time
from pathlib import Path
from typing import TextIO

from benchmarks.common import modelless_worker
from tandem_scheduler.front_end.text.tokenizer import load_tokenizer
from tandem_shared.config import WorkerSettings, read_command_line
from tandem_shared.host.log import configure_logging
from tandem_shared.model_folder import TOKENIZER_FILES, resolve_model
from tandem_shared.step_plan import StepPlan, WorkerInfo
from tandem_worker.service.process import serve
from tandem_worker.service.servicer import WorkerServicer
from tests.support.fake_worker import FakePendingStep, FakeRunner

MODULE = "tests.chaos.support.fake_service"
BLOCK_SIZE = 16
MAX_MODEL_LEN = 2048


class SteadyFakeRunner(FakeRunner):
    """The fake runner with a fixed step time, which writes down the rows that plans add."""

    def __init__(self, info: WorkerInfo, step_s: float, starts: TextIO) -> None:
        super().__init__(info, delay_s=step_s)
        self._starts = starts

    def execute(self, plan: StepPlan) -> FakePendingStep:
        now = time.monotonic()
        for new in plan.added_rows:
            first, second = new.token_ids[:2].tolist()
            self._starts.write(f"{now} {first} {second}\n")
        return super().execute(plan)

    def close(self) -> None:
        self._starts.close()


def main() -> None:
    step_ms, max_rows, starts, *flags = sys.argv[1:]
    settings = read_command_line(WorkerSettings, "fake_service", "A worker without a model.", flags)
    configure_logging(settings.log_level)
    tokenizer = load_tokenizer(resolve_model(settings.model, TOKENIZER_FILES))
    info = modelless_worker(
        vocab_size=tokenizer.get_vocab_size(),
        max_model_len=MAX_MODEL_LEN,
        num_blocks=int(max_rows) * MAX_MODEL_LEN // BLOCK_SIZE + 1,
        block_size=BLOCK_SIZE,
        max_num_rows=int(max_rows),
    )
    # Buffered by line, so that the harness can read the file while the worker runs.
    with Path(starts).open("w", buffering=1) as file:
        runner = SteadyFakeRunner(info, float(step_ms) / 1000, file)
        asyncio.run(serve(settings, WorkerServicer(runner)))


if __name__ == "__main__":
    main()
