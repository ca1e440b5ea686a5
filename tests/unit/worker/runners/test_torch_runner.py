"""Plans by hand through the runner: log-probabilities against transformers, whatever the chunks, beside other rows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, Grammar, SamplingLists
from tandem_shared.step_plan import FAULT_GRAMMAR, FAULT_NAN_LOGITS, FAULT_NO_TOKEN, NewRow, StepPlan
from tandem_worker.runners.torch_runner import TorchRunner
from tests.support.model_factory import save_random_model
from tests.unit.worker.runners.test_exactness import make_runner, reference_logits

PROMPT_LENS = (150, 33, 1)
NUM_DECODES = 6


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).astype(np.int32) for length in PROMPT_LENS]


def plans(chunk: int) -> Iterator[StepPlan]:
    """All rows enter at once and compute chunks till all have decoded NUM_DECODES times or more."""
    added, first = [], 1
    for row, ids in enumerate(prompts()):
        num_blocks = -(-(len(ids) + 200) // 16)
        blocks = np.arange(first, first + num_blocks, dtype=np.int32)
        sampling = RowSampling(temperature=0.0, num_logprobs=20)
        added.append(NewRow(row, row, ids, len(ids), 0, 0, blocks, sampling))
        first += num_blocks
    left = list(PROMPT_LENS)
    step_id = 0
    while any(left):
        step_id += 1
        rows = [row for row, n in enumerate(left) if n]
        counts = [min(chunk, left[row]) for row in rows]
        for row, count in zip(rows, counts, strict=True):
            left[row] -= count
        yield StepPlan(
            step_id,
            added_rows=tuple(added) if step_id == 1 else (),
            chunk_rows=np.array(rows, np.int32),
            chunk_num_tokens=np.array(counts, np.int32),
        )
    for _ in range(NUM_DECODES):
        step_id += 1
        yield StepPlan(step_id)


def run(runner: TorchRunner, chunk: int) -> tuple[list[list[int]], list[list[dict[int, float]]]]:
    """Each row's tokens, and the likeliest tokens' log-probabilities for each."""
    tokens: list[list[int]] = [[] for _ in PROMPT_LENS]
    tops: list[list[dict[int, float]]] = [[] for _ in PROMPT_LENS]
    # Two steps in flight.
    pending = None
    for plan in [*plans(chunk), None]:
        following = None if plan is None else runner.execute(plan)
        if pending is not None:
            result = pending.wait()
            for report, token_id in zip(result.logprobs, result.token_ids, strict=True):
                tokens[report.row].append(token_id)
                tops[report.row].append(dict(zip(report.top_token_ids, report.top_logprobs, strict=True)))
        pending = following
    return tokens, tops


@pytest.mark.parametrize("chunk", [1, 7, 16, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_chunks_and_decode_steps_match_transformers(chunk: int, dtype: str, tolerance: float, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, dtype=dtype, initializer_range=0.1)
    runner = make_runner(folder, dtype=dtype)
    with torch.inference_mode():
        runner.cache.fill_(torch.nan)
    tokens, tops = run(runner, chunk)
    for ids, output, reports in zip(prompts(), tokens, tops, strict=True):
        assert len(output) > NUM_DECODES
        expected = reference_logits(folder, [*ids.tolist(), *output[:-1]])[len(ids) - 1 :].log_softmax(-1)
        for row, report in zip(expected, reports, strict=True):
            found = torch.tensor(list(report.values()))
            torch.testing.assert_close(found, row[list(report)], atol=tolerance, rtol=0)


def test_each_layer_of_a_step_is_progress(tmp_path: Path) -> None:
    """What a CPU's worker says of a long step, before its end."""
    runner = make_runner(save_random_model(tmp_path, num_hidden_layers=3))
    assert isinstance(runner, TorchRunner)
    before = runner.progress
    runner.execute(next(plans(chunk=8))).wait()
    assert runner.progress == before + 3


def test_each_row_that_cannot_sample_has_a_fault_of_its_own(tmp_path: Path) -> None:
    """The other rows get the tokens that they get without them."""
    folder = save_random_model(tmp_path)
    nothing = SamplingLists(allowed_token_ids=(3,), bad_words=((3,),))
    grammar = SamplingLists(grammar=Grammar("x"))
    asked = [NO_LISTS, nothing, grammar, nothing]
    (plan,) = [plan for plan in plans(chunk=200) if plan.added_rows]
    template = plan.added_rows[1]
    blocks = [np.arange(1 + 10 * row, 11 + 10 * row, dtype=np.int32) for row in range(4)]
    added = [replace(template, row=row, block_ids=blocks[row], lists=lists) for row, lists in enumerate(asked)]
    results = []
    for rows in (added[:1], added):
        runner = make_runner(folder)
        first = StepPlan(
            1,
            added_rows=tuple(rows),
            chunk_rows=np.arange(len(rows), dtype=np.int32),
            chunk_num_tokens=np.full(len(rows), len(template.token_ids), np.int32),
        )
        runner.execute(first).wait()
        if len(rows) > 1:
            # Logits that are not finite are the model's fault, whatever is allowed.
            with torch.inference_mode():
                runner.cache[:, :, 31:41] = torch.nan
        results.append(runner.execute(StepPlan(2)).wait())
    alone, together = results
    faults = [(1, FAULT_NO_TOKEN), (2, FAULT_GRAMMAR), (3, FAULT_NAN_LOGITS)]
    assert [(fault.row, fault.code) for fault in together.faults] == faults
    assert together.num_token_ids == [1, 0, 0, 0]
    assert together.token_ids == alone.token_ids
    assert [report.row for report in together.logprobs] == [0]
