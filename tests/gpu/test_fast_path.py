"""The fast path on a CUDA device: graphs against the same kernels launched one by one, logits against transformers and
plain torch, tokens against what transformers' logits call for.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_exactness import FAILED, SAME, Request, judge_output, measure_logit_error
from benchmarks.teacher_forcing import ForcedText, logits_through_plans, relative_errors, teacher_forced_logits
from tandem.internal.v1 import worker_pb2
from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import SchedulerConfig, SequenceRequest, StepOutputs
from tandem_shared.config import WorkerSettings
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists
from tandem_shared.step_codec import encode_plan
from tandem_shared.step_plan import PromptLogprobs, StepPlan
from tandem_worker.runners.cuda.cuda_runner import CudaRunner
from tandem_worker.runners.runner import Runner
from tandem_worker.runners.torch_runner import TorchRunner
from tandem_worker.startup import build_runner
from tests.support.engine import Engine
from tests.support.model_factory import save_random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Kernels are compiled.
    pytest.mark.timeout(600),
]

VOCAB_SIZE = 3000
MAX_NUM_SEQS = 24
NUM_REQUESTS = 40
NUM_BLOCKS = 1024
FEW_BLOCKS = 40
TEXT: list[int] = np.random.default_rng(1).integers(0, VOCAB_SIZE, 330).tolist()

# Samplings, by the sampler that serves a batch of them.
SAMPLINGS = {
    "greedy": (RowSampling(temperature=0.0),),
    "temperature": (RowSampling(temperature=0.0), RowSampling(temperature=0.8)),
    "truncated": (
        RowSampling(temperature=0.0),
        RowSampling(temperature=0.8),
        RowSampling(temperature=0.8, top_k=20, top_p=0.9),
        RowSampling(temperature=1.2, top_k=5, min_p=0.1),
    ),
    "threshold": (
        RowSampling(temperature=0.0),
        RowSampling(temperature=1.2, min_p=0.1),
        RowSampling(temperature=0.8, top_p=0.9),
        RowSampling(temperature=0.8, top_k=200),
    ),
}
ADJUSTED = (
    RowSampling(temperature=0.8),
    RowSampling(temperature=0.8, top_p=0.9, repetition_penalty=1.3, num_prompt_logprobs=3),
    RowSampling(temperature=0.8, top_k=20, presence_penalty=0.7, frequency_penalty=0.3),
    RowSampling(temperature=0.0, repetition_penalty=1.3, min_tokens=15),
)
ALL_SAMPLINGS = {**SAMPLINGS, "adjusted": ADJUSTED}


@dataclass(frozen=True)
class Case:
    """One way to run the requests."""

    depth: int = 1
    chunk: int | None = None
    is_short_of_blocks: bool = False

    def __str__(self) -> str:
        blocks = "preempted" if self.is_short_of_blocks else "roomy"
        return f"depth{self.depth}-chunk{self.chunk or 'whole'}-{blocks}"


CASES = (Case(), Case(depth=2, chunk=7), Case(depth=4, chunk=16), Case(2, 16, True), Case(4, None, True))


def save_model(folder: Path, initializer_range: float, num_positions: int = 1024) -> Path:
    return save_random_model(
        folder,
        dtype="bfloat16",
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=2,
        max_position_embeddings=num_positions,
        initializer_range=initializer_range,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide weights, so that outputs vary."""
    return save_model(tmp_path_factory.mktemp("model"), 0.04)


@pytest.fixture(scope="module")
def usual_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as wide as checkpoints have them, to compare logits by."""
    return save_model(tmp_path_factory.mktemp("model"), 0.02)


def make_runner(folder: Path, **settings: Any) -> Runner:
    defaults = {"dtype": "bfloat16", "device": "cuda", "attention_backend": "triton", "num_blocks": NUM_BLOCKS}
    sizes = {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": 256}
    return build_runner(WorkerSettings(model=str(folder), **{**defaults, **sizes, **settings}))


@pytest.fixture(scope="module")
def with_graphs(folder: Path) -> Runner:
    return make_runner(folder)


@pytest.fixture(scope="module")
def eager(folder: Path) -> Runner:
    return make_runner(folder, enforce_eager=True)


def load_reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).cuda().eval()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return load_reference(folder)


def make_prompts() -> list[np.ndarray]:
    """Short ones, ones that share prefixes, ones that are wholly cached when they come again."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, VOCAB_SIZE, 200)
    prompts = [rng.integers(0, VOCAB_SIZE, int(length)) for length in rng.integers(1, 60, 20)]
    prompts += [np.concatenate([common[:48], rng.integers(0, VOCAB_SIZE, int(n))]) for n in rng.integers(0, 30, 12)]
    prompts += [common[:n] for n in (16, 48, 112, 129, 160, 160, 176, 200)]
    return [prompt.astype(np.int32) for prompt in prompts]


def make_requests(samplings: tuple[RowSampling, ...]) -> list[SequenceRequest]:
    """Some report log-probabilities, some have stop ids that come up now and then."""
    stop_token_ids = frozenset(range(0, VOCAB_SIZE, 40))
    requests = []
    for index, prompt in enumerate(make_prompts()):
        sampling = replace(
            samplings[index % len(samplings)],
            seed=index,
            choice_index=index % 3,
            num_logprobs=5 if index % 4 == 0 else None,
        )
        stops = stop_token_ids if index % 3 == 0 else frozenset()
        lists = make_lists(index, stops) if samplings is ADJUSTED else NO_LISTS
        requests.append(SequenceRequest(index, prompt, 20 + index, sampling, stops, lists=lists))
    return requests


def make_lists(index: int, stop_token_ids: frozenset[int]) -> SamplingLists:
    rng = np.random.default_rng(index)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(sorted(rng.choice(VOCAB_SIZE, count, replace=False).tolist()))

    return SamplingLists(
        stop_token_ids=tuple(sorted(stop_token_ids)),
        logit_bias=tuple((token, 1.5) for token in ids(50)) if index % 2 else (),
        allowed_token_ids=ids(2000) if index % 5 == 0 else (),
        bad_words=tuple((token,) for token in ids(300)[:256]) if index % 3 == 1 else (),
        logprob_token_ids=ids(3) if index % 7 == 0 else (),
    )


class RecordingEngine(Engine):
    """Keeps all plans, and all that came of them: tokens, log-probabilities, ends."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        super().__init__(scheduler, runner)
        self.plans: list[worker_pb2.StepPlan] = []
        self.steps: list[StepOutputs] = []

    def launch(self) -> StepPlan | None:
        plan = super().launch()
        if plan is not None:
            self.plans.append(encode_plan(plan))
        return plan

    def deliver(self) -> StepOutputs:
        self.steps.append(super().deliver())
        return self.steps[-1]


def execute(runner: Runner, case: Case, requests: list[SequenceRequest]) -> RecordingEngine:
    """Runs the requests to their ends on an empty batch. The scheduler may know of fewer blocks than there are."""
    runner.reset()
    info = replace(runner.info, num_blocks=FEW_BLOCKS if case.is_short_of_blocks else NUM_BLOCKS)
    config = SchedulerConfig(
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=256,
        max_chunk_tokens=case.chunk,
        max_plans_in_flight=case.depth,
    )
    engine = RecordingEngine(Scheduler(config, info), runner)
    engine.add(*requests)
    engine.drain()
    engine.scheduler.check_integrity()
    return engine


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sampler", ALL_SAMPLINGS)
def test_graphs_give_the_tokens_of_the_same_kernels_launched_one_by_one(
    sampler: str, case: Case, with_graphs: Runner, eager: Runner
) -> None:
    requests = make_requests(ALL_SAMPLINGS[sampler])
    one, other = execute(with_graphs, case, requests), execute(eager, case, requests)
    for plan, its_plan, step, its_step in zip(one.plans, other.plans, one.steps, other.steps, strict=True):
        assert plan == its_plan
        assert step == its_step
    # The runs had what this test is about.
    load = one.scheduler.load()
    assert (load.num_preemptions > 0) == case.is_short_of_blocks
    assert (load.num_overshoot_tokens > 0) == (case.depth > 1)
    assert load.num_cached_prompt_tokens > 0
    assert any(step.logprobs for step in one.steps)
    assert np.mean([len(set(tokens)) for tokens in one.outputs.values()]) > 15


@pytest.mark.parametrize("sampler", ALL_SAMPLINGS)
def test_tokens_are_those_that_the_logits_of_transformers_call_for(
    sampler: str, with_graphs: Runner, reference: Any
) -> None:
    error = measure_logit_error(with_graphs, reference, [ForcedText(TEXT, 1)])["absolute_max"]
    requests = make_requests(ALL_SAMPLINGS[sampler])
    outputs = execute(with_graphs, Case(2, 16, is_short_of_blocks=True), requests).outputs
    kinds = []
    for request in requests:
        judged = Request(request.prompt_token_ids.tolist(), request.sampling, request.lists)
        kinds += judge_output(reference, judged, outputs[request.sequence_id], error).kinds
    assert kinds.count(FAILED) == 0
    # Most would differ if seeds, choices or positions were mixed up.
    assert kinds.count(SAME) > 0.85 * len(kinds)


def test_prompt_logprobs_are_those_of_plain_torch(usual_folder: Path) -> None:
    """Whole and in chunks, beside decoding rows. The logits' errors are small, and so few ranks differ, by little."""
    prompts = make_prompts()[:20]
    reports: list[dict[int, list[PromptLogprobs]]] = []
    for backend, chunk in (("torch", None), ("triton", None), ("triton", 7)):
        runner = make_runner(usual_folder, attention_backend=backend)
        sampling = RowSampling(num_prompt_logprobs=20)
        engine = execute(runner, Case(2, chunk), [SequenceRequest(i, p, 8, sampling) for i, p in enumerate(prompts)])
        by_sequence: dict[int, list[PromptLogprobs]] = {}
        for step in engine.steps:
            for sequence_id, report in step.prompt_logprobs:
                by_sequence.setdefault(sequence_id, []).append(report)
        reports.append(by_sequence)
    expected, *others = reports
    for index, prompt in enumerate(prompts):
        if len(prompt) == 1:
            continue
        for other in others:
            for name, tolerance in (("logprobs", 0.1), ("top_logprobs", 0.1), ("ranks", 200)):
                ours, theirs = (
                    [value for part in parts[index] for value in getattr(part, name)] for parts in (other, expected)
                )
                assert len(ours) == (20 if name == "top_logprobs" else 1) * (len(prompt) - 1)
                np.testing.assert_allclose(ours, theirs, atol=tolerance)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_logits_match_transformers_and_plain_torch(enforce_eager: bool, usual_folder: Path) -> None:
    runner = make_runner(usual_folder, enforce_eager=enforce_eager)
    plain = make_runner(usual_folder, attention_backend="torch")
    reference = load_reference(usual_folder)
    prompt_lengths = [(129,), (1, 64, 200), (1, 2, 16, 127, 128, 129, 200, 300)]
    for lengths, max_chunk_tokens in itertools.product(prompt_lengths, (7, 25)):
        texts = [ForcedText(TEXT[row:], num_prompt) for row, num_prompt in enumerate(lengths)]
        for text, logits in zip(texts, logits_through_plans(runner, texts, max_chunk_tokens), strict=True):
            with torch.inference_mode():
                ids = torch.tensor([text.token_ids], device=reference.device)
                expected = reference(ids, logits_to_keep=len(logits)).logits[0]
            assert len(logits) == len(text.token_ids) - text.num_prompt + 1
            assert relative_errors(logits, expected).max() < 2e-2
            in_torch = teacher_forced_logits(plain, text.token_ids, len(text.token_ids))[text.num_prompt - 1 :]
            assert relative_errors(logits, in_torch).max() < 2e-2


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", CudaRunner), ("bfloat16", CudaRunner), ("float32", TorchRunner)]
)
def test_the_fast_runner_is_taken_where_it_can_run(dtype: str, expected: type, folder: Path) -> None:
    runner = make_runner(folder, dtype=dtype, attention_backend="auto", enforce_eager=True)
    assert type(runner) is expected
    assert runner.info.dtype == ("float32" if expected is TorchRunner else "bfloat16")


def test_the_pool_is_measured_beside_the_graphs_and_leaves_memory(folder: Path) -> None:
    runner = make_runner(
        folder, num_blocks=None, gpu_memory_utilization=0.2, max_num_seqs=256, max_num_batched_tokens=8192
    )
    free, total = torch.cuda.mem_get_info()
    assert 0.15 * total < total - free < 0.25 * total
    assert runner.info.max_model_len == 1024
