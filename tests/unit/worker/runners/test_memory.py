"""The step that the memory for the KV pool is measured with."""

from pathlib import Path

import numpy as np
import pytest

from tandem_worker.runners.batch import Batch
from tandem_worker.runners.memory import largest_step
from tests.support.builders import worker_info
from tests.support.model_factory import save_random_model
from tests.unit.worker.runners.test_exactness import make_runner


@pytest.mark.parametrize(
    ("budget", "num_rows", "max_model_len", "expected"),
    [
        # The context holds the whole budget: one long prompt, and one token for each other row.
        (8192, 256, 40960, [8192 - 255, *[1] * 255]),
        (8192, 1, 8192, [8192]),
        # The context is shorter than the budget: several prompts as long as the context fill it.
        (8192, 256, 4096, [4096, 3842, *[1] * 254]),
        (8192, 256, 512, [*[512] * 15, 8192 - 15 * 512 - 240, *[1] * 240]),
        (64, 8, 16, [16, 16, 16, 12, 1, 1, 1, 1]),
        # All rows together do not fill the budget: each has as much as it can.
        (8192, 4, 512, [512] * 4),
        (8, 256, 512, [1] * 8),
    ],
)
def test_the_largest_step_fills_the_token_budget(
    budget: int, num_rows: int, max_model_len: int, expected: list[int]
) -> None:
    info = worker_info(max_num_batched_tokens=budget, max_num_rows=num_rows, max_model_len=max_model_len)
    plan = largest_step(info)
    assert plan.chunk_num_tokens.tolist() == expected
    blocks = np.concatenate([new.block_ids for new in plan.added_rows])
    assert sorted(blocks.tolist()) == list(range(1, len(blocks) + 1))
    batch = Batch(
        num_rows=num_rows, num_blocks=len(blocks) + 1, block_size=info.block_size, max_model_len=max_model_len,
        max_num_batched_tokens=budget, vocab_size=info.vocab_size,
    )  # fmt: skip
    assert len(batch.apply(plan).sampling_rows) == len(expected)


def test_the_largest_step_runs_where_several_prompts_fill_it(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    runner = make_runner(folder, max_model_len=24, max_num_seqs=4, max_num_batched_tokens=64, block_size=4)
    plan = largest_step(runner.info)
    assert plan.chunk_num_tokens.sum() == 64
    assert runner.execute(plan).wait().num_token_ids == [1] * 4
