"""Two GPUs as one worker: the tokens that transformers' logits call for, by each way to sum, and one end for all."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_exactness import FAILED, SAME, Request, judge_output, measure_logit_error
from benchmarks.teacher_forcing import ForcedText
from tandem.v1 import inference_pb2
from tandem_shared.sampling_fields import RowSampling
from tests.e2e.services import Engine, generate_request
from tests.e2e.test_tensor_parallel import ranks_of, wait_all_gone
from tests.e2e.waiting import WAIT_S
from tests.gpu.requirements import needs_flash_attn
from tests.gpu.test_fast_path import TEXT, VOCAB_SIZE, make_runner, save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    # Kernels are compiled.
    pytest.mark.timeout(600),
]

NUM_TOKENS = 24
# The first prompt alone makes a step of two micro-batches. Others are prefilled and decode beside it.
PROMPT_LENGTHS = (1900, 650, 600, 1, 5, 30, 129, 400, 64, 17)
TOLERANCE = 2.0
"""Sums over ranks are rounded more often than one rank's: errors of so many times its largest."""


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    sampling: RowSampling

    def request(self) -> inference_pb2.GenerateStreamRequest:
        sampling = self.sampling
        request = generate_request(self.token_ids, NUM_TOKENS, temperature=sampling.temperature, seed=sampling.seed)
        for name in ("top_k", "top_p", "repetition_penalty", "presence_penalty"):
            setattr(request.sampling, name, getattr(sampling, name))
        request.output.num_logprobs = 2
        return request


def make_prompts() -> list[Prompt]:
    """Each of the samplers, which need a shard's logits or all, of the model's logits and of adjusted ones."""
    rng = np.random.default_rng(3)
    samplings = [
        RowSampling(temperature=0.0),
        RowSampling(temperature=0.8),
        RowSampling(temperature=0.8, top_k=20, top_p=0.9),
        RowSampling(temperature=0.8, top_p=0.9),
        RowSampling(temperature=0.8, repetition_penalty=1.3),
        RowSampling(temperature=0.8, top_k=20, presence_penalty=0.5),
        RowSampling(temperature=0.8, top_p=0.9, repetition_penalty=1.3),
    ]
    return [
        Prompt(rng.integers(0, VOCAB_SIZE, length).tolist(), replace(samplings[number % len(samplings)], seed=number))
        for number, length in enumerate(PROMPT_LENGTHS)
    ]


def start(folder: Path, *flags: str, dtype: str = "bfloat16", num_ranks: int = 2) -> Engine:
    sizes = ["--tp-size", str(num_ranks), "--num-blocks", "512", "--max-num-seqs", "24"]
    budget = ["--max-num-batched-tokens", "2048"]
    return Engine(folder, worker_flags=["--device", "cuda", *sizes, *budget, *flags], dtype=dtype)


def run(engine: Engine) -> list[list[int]]:
    return [stream.result() for stream in [engine.stream(prompt.request()) for prompt in make_prompts()]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), 0.04, num_positions=2048)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).cuda().eval()


@pytest.fixture(scope="module")
def error(folder: Path, reference: Any) -> float:
    runner = make_runner(folder, enforce_eager=True)
    return TOLERANCE * measure_logit_error(runner, reference, [ForcedText(TEXT, 1)])["absolute_max"]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--enforce-eager", "true"),
        ("--all-reduce", "nccl"),
        pytest.param(("--attention-backend", "flash-attn", "--block-size", "256"), marks=needs_flash_attn),
    ],
    ids=str,
)
def test_tokens_are_those_that_the_logits_of_transformers_call_for(
    flags: tuple[str, ...], folder: Path, reference: Any, error: float
) -> None:
    engine = start(folder, "--attention-backend", "triton", *flags)
    try:
        outputs = run(engine)
        log = engine.worker.log_file.read_text()
    finally:
        engine.close()
    assert "NCCL alone" not in log
    kinds: list[str] = []
    for prompt, output in zip(make_prompts(), outputs, strict=True):
        kinds += judge_output(reference, Request(prompt.token_ids, prompt.sampling), output, error).kinds
    assert kinds.count(FAILED) == 0
    assert kinds.count(SAME) > 0.8 * len(kinds)


def test_plain_torch_gives_one_ranks_tokens(folder: Path) -> None:
    outputs = []
    for num_ranks in (1, 2):
        engine = start(folder, "--attention-backend", "torch", dtype="float64", num_ranks=num_ranks)
        try:
            outputs.append(run(engine))
        finally:
            engine.close()
    assert outputs[0] == outputs[1]


@pytest.fixture
def streaming(folder: Path) -> Iterator[Engine]:
    engine = start(folder, "--attention-backend", "triton")
    for number in range(2):
        engine.stream(generate_request(TEXT[number:40], 900)).wait_tokens(10)
    yield engine
    engine.close()


def test_sigterm_ends_both_ranks_well(streaming: Engine) -> None:
    ranks = ranks_of(streaming.worker)
    assert len(ranks) == 2
    streaming.worker.signal(signal.SIGTERM)
    wait_all_gone(ranks, 20)
    assert streaming.worker.process.wait(WAIT_S) == 0
    assert "lost" not in streaming.worker.log_file.read_text()


def test_a_killed_rank_ends_the_group(streaming: Engine) -> None:
    """While the other's kernels wait for it on the GPU."""
    ranks = ranks_of(streaming.worker)
    psutil.Process(ranks[1].pid).kill()
    wait_all_gone(ranks, 10)
