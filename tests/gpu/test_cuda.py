"""The plain worker on a CUDA device: the same modules, the same answers. test_fast_path.py has the fast one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.teacher_forcing import relative_errors, teacher_forced_logits
from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import SchedulerConfig, SequenceRequest
from tandem_shared.config import WorkerSettings
from tandem_shared.sampling_fields import RowSampling
from tandem_worker.runners.sampler import gumbel_noise
from tandem_worker.runners.torch_runner import TorchRunner
from tandem_worker.startup import build_runner
from tests.support.engine import run
from tests.support.model_factory import save_random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_REQUESTS = 24


def make_runner(folder: Path, dtype: str, device: str = "cuda", num_blocks: int = 512) -> TorchRunner:
    settings = WorkerSettings(
        model=str(folder),
        dtype=dtype,
        device=device,
        attention_backend="torch",
        num_blocks=num_blocks,
        max_num_seqs=32,
        max_num_batched_tokens=256,
    )
    return build_runner(settings)


def make_requests() -> list[SequenceRequest]:
    rng = np.random.default_rng(0)
    requests = []
    for index in range(NUM_REQUESTS):
        prompt = rng.integers(0, 256, int(rng.integers(1, 60))).astype(np.int32)
        sampling = RowSampling(temperature=index % 2 * 0.9, top_k=index % 3 * 10, top_p=0.95, seed=index)
        requests.append(SequenceRequest(index, prompt, 30, sampling))
    return requests


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-5), ("bfloat16", 3e-2)])
def test_logits_match_transformers(tmp_path: Path, dtype: str, tolerance: float) -> None:
    folder = save_random_model(tmp_path, dtype=dtype, initializer_range=0.05)
    runner = make_runner(folder, dtype)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).cuda().eval()
    ids = np.random.default_rng(1).integers(0, 256, 100).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids], device="cuda")).logits[0]
    assert relative_errors(teacher_forced_logits(runner, ids, 70), expected).max() < tolerance


def test_same_tokens_as_on_a_cpu_whatever_the_batching(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, dtype="float64")
    config = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=256, max_plans_in_flight=1)
    on_cpu = make_runner(folder, "float64", "cpu")
    truth = run(Scheduler(config, on_cpu.info), on_cpu, make_requests())
    for depth, chunk, num_blocks in ((2, None, 512), (4, 7, 512), (2, 16, 24)):
        runner = make_runner(folder, "float64", num_blocks=num_blocks)
        scheduler = Scheduler(replace(config, max_plans_in_flight=depth, max_chunk_tokens=chunk), runner.info)
        assert run(scheduler, runner, make_requests()) == truth
        assert (scheduler.load().num_preemptions > 0) == (num_blocks == 24)


@pytest.mark.parametrize("max_model_len", [32768, 512])
def test_the_pool_is_measured_and_leaves_memory(max_model_len: int, tmp_path: Path) -> None:
    """With a context below the token budget, several prompts fill the step that is measured."""
    folder = save_random_model(tmp_path, dtype="float32", max_position_embeddings=32768)
    settings = WorkerSettings(
        model=str(folder), device="cuda", attention_backend="torch", gpu_memory_utilization=0.2, max_num_seqs=256,
        max_model_len=max_model_len,
    )  # fmt: skip
    runner = build_runner(settings)
    free, total = torch.cuda.mem_get_info()
    assert total - free < 0.25 * total
    assert runner.info.max_model_len == max_model_len


def test_noise_is_that_of_a_cpu() -> None:
    seed = torch.tensor([0, 1, -5, 2**62])
    choice, position = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 5, 1000, 40000])
    on_cpu = gumbel_noise(seed, choice, position, 5000)
    on_gpu = gumbel_noise(seed.cuda(), choice.cuda(), position.cuda(), 5000)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-12, atol=1e-12)
