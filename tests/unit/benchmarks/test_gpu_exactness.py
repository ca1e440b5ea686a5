"""How benchmarks/gpu_exactness.py judges tokens: on scores written by hand, and on outputs of the plain runner."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_exactness import (
    FAILED,
    NEAR_CUT,
    NEAR_TIE,
    SAME,
    SAMPLINGS,
    BenchmarkError,
    Request,
    Verdicts,
    cut_prompts,
    judge,
    judge_output,
    summarize,
)
from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import SchedulerConfig, SequenceRequest
from tests.support.engine import run
from tests.support.model_factory import save_random_model
from tests.unit.worker.runners.test_exactness import make_runner

TOLERANCE = 0.1
INF = float("inf")


def verdict(
    scaled: list[float], token_id: int, noise: list[float] | None = None, num_kept: int = 0
) -> tuple[str, float]:
    """The judgement on one token. Truncation keeps the num_kept largest logits, or all."""
    logits = torch.tensor([scaled])
    is_kept = logits >= logits[0].sort(descending=True).values[num_kept - 1]
    noises = torch.tensor([noise or [0.0] * len(scaled)])
    verdicts = judge(logits, is_kept, noises, torch.tensor([token_id]), TOLERANCE)
    return verdicts.kinds[0], verdicts.gaps[0]


def test_the_references_own_choice_is_the_same() -> None:
    assert verdict([1.0, 3.0, 2.0], 1) == (SAME, 0.0)


def test_noise_counts() -> None:
    assert verdict([1.0, 3.0, 2.0], 2, noise=[0.0, 0.0, 5.0]) == (SAME, 0.0)
    assert verdict([1.0, 3.0, 2.0], 1, noise=[0.0, 0.0, 5.0]) == (FAILED, 4.0)


def test_a_near_tie_passes_and_a_clear_loss_fails() -> None:
    kind, gap = verdict([1.0, 3.0, 2.95], 2)
    assert kind == NEAR_TIE and gap == pytest.approx(0.05, abs=1e-6)
    kind, gap = verdict([1.0, 3.0, 2.85], 2)
    assert kind == FAILED and gap == pytest.approx(0.15, abs=1e-6)


def test_a_token_cut_by_less_than_the_tolerance_passes() -> None:
    # Among tokens 0, 1 and 2 the noise would choose 2, which the reference cuts.
    assert verdict([3.0, 2.0, 1.95, 0.0], 2, noise=[0.0, 0.0, 4.0, 0.0], num_kept=2) == (NEAR_CUT, INF)


def test_a_token_cut_by_more_fails() -> None:
    assert verdict([3.0, 2.0, 1.85, 0.0], 2, noise=[0.0, 0.0, 4.0, 0.0], num_kept=2) == (FAILED, INF)


def test_a_token_near_the_cut_still_must_have_the_best_score() -> None:
    assert verdict([3.0, 2.0, 1.95, 0.0], 2, num_kept=2) == (FAILED, INF)


def test_the_references_choice_may_be_the_one_that_was_cut() -> None:
    noise = [0.0, 4.0, 0.0, 0.0]
    assert verdict([3.0, 2.0, 1.95, 0.0], 0, noise, num_kept=2) == (NEAR_CUT, 3.0)
    # This does not hold if it is far above the cut.
    assert verdict([3.0, 2.0, 1.5, 0.0], 0, noise, num_kept=3) == (FAILED, 3.0)


def test_with_one_token_kept_another_passes_only_next_to_it() -> None:
    assert verdict([3.0, 2.95, 0.0], 1, num_kept=1)[0] == NEAR_CUT
    assert verdict([3.0, 2.85, 0.0], 1, num_kept=1)[0] == FAILED


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_the_plain_runner_gives_is_the_same_at_every_position(sampling: str, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    runner = make_runner(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    request = Request(list(range(20)), replace(SAMPLINGS[sampling], seed=5, choice_index=1))
    sequence = SequenceRequest("r/1", np.array(request.prompt, np.int32), 30, request.sampling)
    output = run(Scheduler(SchedulerConfig(), runner.info), runner, [sequence])["r/1"]
    assert judge_output(reference, request, output, 1e-5).kinds == [SAME] * 30
    if sampling != "greedy":
        for changed in ({"seed": 6}, {"choice_index": 0}):
            other = replace(request, sampling=replace(request.sampling, **changed))
            assert judge_output(reference, other, output, 1e-5).kinds.count(FAILED) > 15


def test_an_output_is_counted_by_its_first_difference() -> None:
    summary = summarize(
        [
            Verdicts([SAME, SAME], [0.0, 0.0]),
            Verdicts([SAME, NEAR_TIE, FAILED], [0.0, 0.02, 7.0]),
            Verdicts([NEAR_CUT, NEAR_TIE], [INF, 0.03]),
        ]
    )
    assert summary == {
        "outputs": 3,
        "outputs_by_first_difference": {SAME: 1, NEAR_TIE: 1, NEAR_CUT: 1, FAILED: 0},
        "positions": 7,
        "positions_by_difference": {SAME: 3, NEAR_TIE: 2, NEAR_CUT: 1, FAILED: 1},
        "largest_near_tie": 0.03,
    }


def test_prompts_are_slices_of_the_text() -> None:
    ids = list(range(100))
    assert cut_prompts(ids, [2, 3, 40]) == [[0, 1], [20, 21, 22], list(range(40, 80))]
    with pytest.raises(BenchmarkError, match="too few"):
        cut_prompts(ids[:41], [2, 3, 40])
