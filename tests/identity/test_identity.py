"""Equal requests give equal tokens, whatever else runs and however the work is cut up.

Each run executes the same 64 requests in float64 through the real scheduler core and the real runner. The truth
for greedy requests is transformers' own generation; for seeded ones, the base run: alone, whole prefill, one plan
in flight, no prefix cache.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import Load, SchedulerConfig, SequenceRequest
from tandem_shared.config import WorkerSettings
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import StepPlan
from tandem_worker.runners.runner import PendingStep
from tandem_worker.runners.torch_runner import TorchRunner
from tandem_worker.startup import build_runner
from tests.support.engine import run
from tests.support.model_factory import save_random_model

NUM_REQUESTS = 64
NUM_OUTPUT_TOKENS = 40
MAX_NUM_BATCHED_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """One way to run the requests. The default is the base run, from which the truth is taken."""

    batch: int = 1
    prefix_caching: bool = False
    chunk: int | None = None
    preempted: bool = False
    depth: int = 1
    block_size: int = 16

    def __str__(self) -> str:
        return (
            f"batch{self.batch}-{'cache' if self.prefix_caching else 'nocache'}-chunk{self.chunk or 'whole'}-"
            f"{'preempted' if self.preempted else 'roomy'}-depth{self.depth}-block{self.block_size}"
        )


FACTORS: dict[str, tuple[object, ...]] = {
    "batch": (1, NUM_REQUESTS),
    "prefix_caching": (False, True),
    "chunk": (None, 1, 7, 16),
    "preempted": (False, True),
    "depth": (1, 2, 4),
    "block_size": (16, 1, 256),
}


def pairs_of(case: Case) -> set[tuple[str, object, str, object]]:
    return {(a, getattr(case, a), b, getattr(case, b)) for a, b in itertools.combinations(FACTORS, 2)}


def pairwise_cases() -> list[Case]:
    """A small set of cases in which every two values of two factors meet: greedily, the one with the most new pairs."""
    everything = [Case(**dict(zip(FACTORS, values, strict=True))) for values in itertools.product(*FACTORS.values())]  # type: ignore[arg-type]
    # A request that runs alone is never preempted.
    possible = [case for case in everything if not (case.batch == 1 and case.preempted)]
    missing = set().union(*map(pairs_of, possible))
    chosen = []
    while missing:
        best = max(possible, key=lambda case: len(pairs_of(case) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def one_factor_cases() -> list[Case]:
    cases = [replace(Case(), **{name: value}) for name, values in FACTORS.items() for value in values[1:]]  # type: ignore[arg-type]
    return [replace(case, batch=NUM_REQUESTS) if case.preempted else case for case in cases]


PAIRWISE_CASES = pairwise_cases()
CASES = [
    *PAIRWISE_CASES,
    # Each changes one factor of the base run, and so tells which is at fault if a pairwise case fails.
    *(pytest.param(case, marks=pytest.mark.slow) for case in one_factor_cases() if case not in PAIRWISE_CASES),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A wide initialisation, so that greedy outputs don't fall into loops.
    return save_random_model(tmp_path_factory.mktemp("model"), dtype="float64", seed=3)


def make_prompts(vocab_size: int) -> list[np.ndarray]:
    """Prompts that are short, that share prefixes, and whose outputs cross the end of the largest block."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, vocab_size, 256)
    prompts = [rng.integers(0, vocab_size, int(length)) for length in rng.integers(1, 40, 40)]
    prompts += [np.concatenate([common[:32], rng.integers(0, vocab_size, int(n))]) for n in rng.integers(0, 20, 14)]
    prompts += [common[:n] for n in (16, 32, 240, 244, 248, 255)]
    prompts += [np.concatenate([common, rng.integers(0, vocab_size, n)]) for n in (0, 1, 9, 20)]
    return [prompt.astype(np.int32) for prompt in prompts]


def make_requests(vocab_size: int) -> list[SequenceRequest]:
    """Requests of which half are greedy and half seeded, with every combination of truncations."""
    requests = []
    for index, prompt in enumerate(make_prompts(vocab_size)):
        sampling = RowSampling(temperature=0.0)
        if index % 2:
            sampling = RowSampling(
                temperature=(0.7, 1.0, 1.5)[index % 3],
                top_k=(0, 20)[index // 2 % 2],
                top_p=(1.0, 0.95)[index // 4 % 2],
                min_p=(0.0, 0.02)[index // 8 % 2],
                seed=index,
                choice_index=index % 5,
            )
        requests.append(SequenceRequest(index, prompt, NUM_OUTPUT_TOKENS, sampling))
    return requests


class CountingRunner:
    """The real runner, with a count of the rows added to it: all but one for each request are resumes."""

    def __init__(self, runner: TorchRunner) -> None:
        self.info = runner.info
        self.reset = runner.reset
        self.num_added = 0
        self._runner = runner

    def execute(self, plan: StepPlan) -> PendingStep:
        self.num_added += len(plan.added_rows)
        return self._runner.execute(plan)


def execute(folder: Path, case: Case, requests: list[SequenceRequest]) -> tuple[dict[str, list[int]], Load, int]:
    """Runs the requests, case.batch at a time: the next ones are added when the ones before have ended. Gives the
    outputs, the scheduler's counts and the number of resumes.
    """
    num_pool_tokens = 1536 if case.preempted else 256 * 2 * NUM_REQUESTS
    runner = CountingRunner(make_runner(folder, case.block_size, num_pool_tokens // case.block_size + 1))
    config = SchedulerConfig(
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_chunk_tokens=case.chunk,
        max_plans_in_flight=case.depth,
        enable_prefix_caching=case.prefix_caching,
    )
    scheduler = Scheduler(config, runner.info)
    outputs: dict[str, list[int]] = {}
    for start in range(0, len(requests), case.batch):
        outputs |= run(scheduler, runner, requests[start : start + case.batch])
    scheduler.check_integrity()
    return outputs, scheduler.load(), runner.num_added - len(requests)


def make_runner(folder: Path, block_size: int, num_blocks: int) -> TorchRunner:
    settings = WorkerSettings(
        model=str(folder),
        dtype="float64",
        device="cpu",
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        num_threads=1,
    )
    return build_runner(settings)


@dataclass(frozen=True)
class Truth:
    requests: list[SequenceRequest]
    outputs: dict[str, list[int]]


@pytest.fixture(scope="module")
def truth(folder: Path) -> Truth:
    """The base run's outputs; the greedy ones are checked against transformers. Then some requests get stop ids that
    cut their outputs short, so that depths above one overshoot.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    requests = make_requests(model.config.vocab_size)
    outputs, _, _ = execute(folder, Case(), requests)
    for request in requests:
        if request.sampling.temperature == 0:
            prompt = torch.tensor(request.prompt_token_ids[None].astype(np.int64))
            expected = model.generate(
                prompt, max_new_tokens=NUM_OUTPUT_TOKENS, min_new_tokens=NUM_OUTPUT_TOKENS, do_sample=False
            )
            assert outputs[request.sequence_id] == expected[0, prompt.shape[1] :].tolist()
    assert np.mean([len(set(tokens)) for tokens in outputs.values()]) >= 20
    for index in range(0, NUM_REQUESTS, 3):
        tokens = outputs[requests[index].sequence_id]
        stop = tokens[5 + index // 3]
        requests[index] = replace(requests[index], stop_token_ids=frozenset({stop}))
        outputs[requests[index].sequence_id] = tokens[: tokens.index(stop) + 1]
    return Truth(requests, outputs)


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, int]]:
    """Counts of what happened over all cases. Each must have happened at least once."""
    counts = dict.fromkeys(("preemptions", "resumes", "prefix_hits", "overshoots"), 0)
    yield counts
    assert all(counts.values()), counts


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_tokens(case: Case, folder: Path, truth: Truth, seen: dict[str, int]) -> None:
    outputs, load, num_resumes = execute(folder, case, truth.requests)
    assert outputs == truth.outputs
    assert (load.num_preemptions > 0) == (num_resumes > 0) == case.preempted
    if not case.prefix_caching:
        assert load.num_cached_prompt_tokens == 0
    elif case.batch == 1 or case.block_size < 256:
        # When all requests run at once, the others may be admitted before any prompt has filled a block of 256.
        assert load.num_cached_prompt_tokens > 0
    assert (load.num_overshoot_tokens > 0) == (case.depth > 1)
    seen["preemptions"] += load.num_preemptions
    seen["resumes"] += num_resumes
    seen["prefix_hits"] += load.num_cached_prompt_tokens
    seen["overshoots"] += load.num_overshoot_tokens


def test_every_pair_of_values_meets() -> None:
    met = set().union(*map(pairs_of, PAIRWISE_CASES))
    for (a, values_a), (b, values_b) in itertools.combinations(FACTORS.items(), 2):
        for value_a, value_b in itertools.product(values_a, values_b):
            alone_and_preempted = {(a, value_a), (b, value_b)} == {("batch", 1), ("preempted", True)}
            assert ((a, value_a, b, value_b) in met) != alone_and_preempted
