"""A mixture of experts on the fast path: graphs against single launches, logits against transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.teacher_forcing import ForcedText, logits_through_plans, relative_errors
from tandem_worker.runners.cuda.cuda_runner import CudaRunner
from tests.gpu.test_fast_path import SAMPLINGS, TEXT, VOCAB_SIZE, Case, execute, make_requests, make_runner
from tests.support.model_factory import save_random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Kernels are compiled.
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(
        tmp_path_factory.mktemp("model"),
        dtype="bfloat16",
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=3,
        max_position_embeddings=1024,
        initializer_range=0.04,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )


def test_graphs_give_the_tokens_of_the_same_kernels_launched_one_by_one(folder: Path) -> None:
    with_graphs, eager = make_runner(folder), make_runner(folder, enforce_eager=True)
    assert isinstance(with_graphs, CudaRunner)
    requests, case = make_requests(SAMPLINGS["truncated"]), Case(2, 16, is_short_of_blocks=True)
    one, other = execute(with_graphs, case, requests), execute(eager, case, requests)
    assert one.steps == other.steps
    assert one.scheduler.load().num_preemptions > 0


def test_logits_match_transformers(folder: Path) -> None:
    """At most positions: where two experts are nearly as good, rounding can choose the other."""
    runner = make_runner(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").cuda()
    texts = [ForcedText(TEXT[row:], num_prompt) for row, num_prompt in enumerate((1, 2, 16, 127, 128, 129, 200, 300))]
    for text, logits in zip(texts, logits_through_plans(runner, texts, 25), strict=True):
        with torch.inference_mode():
            ids = torch.tensor([text.token_ids], device=reference.device)
            expected = reference(ids, logits_to_keep=len(logits)).logits[0]
        errors = relative_errors(logits, expected)
        assert np.median(errors) < 2e-2
        assert (errors < 5e-2).mean() > 0.8
