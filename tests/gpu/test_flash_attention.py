"""The fast path with flash-attn: graphs against single launches, logits and tokens against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_exactness import FAILED, SAME, Request, judge_output, measure_logit_error
from benchmarks.teacher_forcing import ForcedText, logits_through_plans, relative_errors
from tandem_worker.runners.cuda.cuda_runner import CudaRunner
from tests.gpu.requirements import needs_flash_attn
from tests.gpu.test_fast_path import (
    SAMPLINGS,
    TEXT,
    Case,
    execute,
    load_reference,
    make_requests,
    make_runner,
    save_model,
)

pytestmark = [
    pytest.mark.gpu,
    needs_flash_attn,
    # Kernels are compiled.
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide weights, so that outputs vary."""
    return save_model(tmp_path_factory.mktemp("model"), 0.04)


def make_flash_runner(folder: Path, **settings: Any) -> CudaRunner:
    from tandem_worker.attention.flash_attention import FlashAttention

    runner = make_runner(folder, attention_backend="flash-attn", block_size=256, **settings)
    assert isinstance(runner, CudaRunner)
    assert isinstance(runner.model.operations.attention, FlashAttention)
    return runner


@pytest.mark.parametrize("case", [Case(), Case(depth=4, chunk=16)], ids=str)
@pytest.mark.parametrize("sampler", ["temperature", "general"])
def test_graphs_and_single_launches_give_the_tokens_that_transformers_logits_call_for(
    sampler: str, case: Case, folder: Path
) -> None:
    with_graphs, eager = make_flash_runner(folder), make_flash_runner(folder, enforce_eager=True)
    requests = make_requests(SAMPLINGS[sampler])
    one, other = execute(with_graphs, case, requests), execute(eager, case, requests)
    assert one.steps == other.steps
    reference = load_reference(folder)
    error = measure_logit_error(with_graphs, reference, [ForcedText(TEXT, 1)])["absolute_max"]
    kinds = []
    for request in requests:
        judged = Request(request.prompt_token_ids.tolist(), request.sampling)
        kinds += judge_output(reference, judged, one.outputs[request.sequence_id], error).kinds
    assert kinds.count(FAILED) == 0
    assert kinds.count(SAME) > 0.85 * len(kinds)


@pytest.mark.parametrize("max_chunk_tokens", [7, 25])
def test_logits_match_transformers_and_our_kernels(max_chunk_tokens: int, tmp_path: Path) -> None:
    """With weights as wide as checkpoints have them. Prompts reach over the edge of a block, and decode over one."""
    folder = save_model(tmp_path, 0.02)
    flash, ours, reference = make_flash_runner(folder), make_runner(folder), load_reference(folder)
    assert isinstance(ours, CudaRunner)
    texts = [ForcedText(TEXT[row:], num_prompt) for row, num_prompt in enumerate((1, 2, 127, 128, 129, 255, 256, 300))]
    through_flash = logits_through_plans(flash, texts, max_chunk_tokens)
    through_ours = logits_through_plans(ours, texts, max_chunk_tokens)
    for text, logits, our_logits in zip(texts, through_flash, through_ours, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([text.token_ids], device=reference.device)
            expected = reference(ids, logits_to_keep=len(logits)).logits[0]
        assert relative_errors(logits, expected).max() < 2e-2
        assert relative_errors(our_logits, logits).max() < 2e-2
