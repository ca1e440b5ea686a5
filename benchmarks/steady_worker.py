"""A worker service whose steps all take the same time, so that only the scheduler is measured.

Usage: python -m benchmarks.steady_worker STEP_MS TOKENIZER_FOLDER [FLAGS OF tandem-worker]

A token's id depends on its row and step, and all ids of the vocabulary come. Of the flags, only --max-num-seqs and
those that say where to listen have an effect.
"""

import asyncio
import sys
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.common import modelless_worker
from tandem_shared.config import WorkerSettings, read_command_line
from tandem_shared.host.log import configure_logging
from tandem_shared.model_folder import tokenizer_digest
from tandem_shared.step_plan import NewRow, PromptLogprobs, RowLogprobs, StepPlan, StepResult
from tandem_worker.service.process import serve
from tandem_worker.service.servicer import WorkerServicer

MAX_MODEL_LEN = 40_960
"""The context of Qwen3."""
NUM_BLOCKS = 400_000
STRIDE = 7919
"""The distance between the ids of successive steps; a prime, so that all ids come."""


class SteadyStep:
    def __init__(self, result: StepResult, due: float) -> None:
        self._result = result
        self._due = due

    def wait(self) -> StepResult:
        time.sleep(max(0.0, self._due - time.monotonic()))
        return self._result


class SteadyRunner:
    """A runner that knows of each row only how much of its prompt is left, and which log-probabilities it wants."""

    progress = 0

    def __init__(self, step_s: float, tokenizer_folder: Path, max_num_rows: int = 256) -> None:
        tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        self._step_s = step_s
        self.info = modelless_worker(
            vocab_size=tokenizer.get_vocab_size(),
            max_model_len=MAX_MODEL_LEN,
            num_blocks=NUM_BLOCKS,
            max_num_rows=max_num_rows,
            tokenizer_digest=tokenizer_digest(tokenizer_folder),
        )
        self.reset()

    def reset(self) -> None:
        self._left: dict[int, int] = {}
        self._rows: dict[int, NewRow] = {}
        self._due = 0.0

    def close(self) -> None:
        pass

    def execute(self, plan: StepPlan) -> SteadyStep:
        for row in plan.removed_rows.tolist():
            del self._left[row], self._rows[row]
        for new in plan.added_rows:
            self._left[new.row] = len(new.token_ids) - new.num_computed_tokens
            self._rows[new.row] = new
        prompt_logprobs = []
        for row, count in zip(plan.chunk_rows.tolist(), plan.chunk_num_tokens.tolist(), strict=True):
            if self._rows[row].sampling.num_prompt_logprobs is not None:
                prompt_logprobs.append(self._prompt_report(row, count))
            self._left[row] -= count
        rows = [row for row in sorted(self._left) if not self._left[row]]
        token_ids = [(plan.step_id * STRIDE + row) % self.info.vocab_size for row in rows]
        logprobs = tuple(
            self._report(row, token_id, count)
            for row, token_id in zip(rows, token_ids, strict=True)
            if (count := self._rows[row].sampling.num_logprobs) is not None
        )
        result = StepResult(plan.step_id, [1] * len(rows), token_ids, (), logprobs, tuple(prompt_logprobs))
        # A step begins when the previous one ends, as on a device whose next step is queued.
        self._due = max(self._due, time.monotonic()) + self._step_s
        return SteadyStep(result, self._due)

    def _report(self, row: int, token_id: int, count: int) -> RowLogprobs:
        top = tuple((token_id + i) % self.info.vocab_size for i in range(count))
        requested = (-2.0,) * len(self._rows[row].lists.logprob_token_ids)
        return RowLogprobs(row, -1.0, top, (-1.5,) * count, 1, requested)

    def _prompt_report(self, row: int, count: int) -> PromptLogprobs:
        """The report of the positions behind the next `count` tokens, all of which are the prompt's."""
        new = self._rows[row]
        first = len(new.token_ids) - self._left[row] + 1
        num, num_top = min(first + count, new.num_prompt_tokens) - first, new.sampling.num_prompt_logprobs or 0
        top = np.tile(np.arange(num_top, dtype=np.int32), num)
        logprobs, top_logprobs = np.full(num, -1.0, np.float32), np.full(len(top), -1.5, np.float32)
        return PromptLogprobs(row, first, logprobs, np.ones(num, np.int32), num_top, top, top_logprobs)


def main() -> None:
    step_ms, folder, flags = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    settings = read_command_line(WorkerSettings, "steady_worker", "A worker without a model.", flags)
    configure_logging(settings.log_level)
    asyncio.run(serve(settings, WorkerServicer(SteadyRunner(step_ms / 1000, folder, settings.max_num_seqs))))


if __name__ == "__main__":
    main()
