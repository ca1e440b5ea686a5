"""Equal requests give equal tokens, whatever else runs and however the work is cut up.

Each run (runs.py) executes the same 64 requests (requests.py) in float64 through the real scheduler core and the real
runner. The truth (conftest.py) is transformers' generation: greedy, or seeded with Tandem's noise as a logits
processor. Log-probabilities are compared with its raw logits too. What transformers and the base run agree on (alone,
whole prefill, one plan in flight, no prefix cache), all other runs must repeat.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS
from tests.identity.conftest import Truth
from tests.identity.ranks import run_ranks
from tests.identity.requests import NUM_REQUESTS, make_requests
from tests.identity.runs import Case, assert_equal_runs, execute

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
def seen() -> Iterator[dict[str, int]]:
    """Counts of what happened over all cases. Each must have happened at least once."""
    counts = dict.fromkeys(("preemptions", "resumes", "prefix_hits", "overshoots"), 0)
    yield counts
    assert all(counts.values()), counts


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_tokens(case: Case, folder: Path, truth: Truth, seen: dict[str, int]) -> None:
    run = execute(folder, case, truth.requests)
    load = run.load
    assert_equal_runs(run, truth.run)
    assert (load.num_preemptions > 0) == (run.num_resumes > 0) == case.preempted
    if not case.prefix_caching:
        assert load.num_cached_prompt_tokens == 0
    elif case.batch == 1 or case.block_size < 256:
        # When all requests run at once, the others may be admitted before any prompt has filled a block of 256.
        assert load.num_cached_prompt_tokens > 0
    assert (load.num_overshoot_tokens > 0) == (case.depth > 1)
    seen["preemptions"] += load.num_preemptions
    seen["resumes"] += run.num_resumes
    seen["prefix_hits"] += load.num_cached_prompt_tokens
    seen["overshoots"] += load.num_overshoot_tokens


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_have_the_same_tokens(size: int, folder: Path, truth: Truth, tmp_path: Path) -> None:
    case = Case(batch=NUM_REQUESTS, prefix_caching=True, chunk=16, preempted=True, depth=2)
    for run in run_ranks(size, folder, case, truth.requests, tmp_path):
        assert run.num_resumes > 0
        assert_equal_runs(run, truth.run)


def test_every_field_is_asked_for() -> None:
    requests = make_requests(256)
    for owner, name in [("sampling", field.name) for field in dataclasses.fields(RowSampling)] + [
        ("lists", field.name) for field in dataclasses.fields(NO_LISTS)
    ]:
        default = getattr(RowSampling() if owner == "sampling" else NO_LISTS, name)
        asking = [it for it in requests if getattr(getattr(it, owner), name) != default]
        assert len(asking) >= 5 or name == "grammar", name


def test_every_pair_of_values_meets() -> None:
    met = set().union(*map(pairs_of, PAIRWISE_CASES))
    for (a, values_a), (b, values_b) in itertools.combinations(FACTORS.items(), 2):
        for value_a, value_b in itertools.product(values_a, values_b):
            alone_and_preempted = {(a, value_a), (b, value_b)} == {("batch", 1), ("preempted", True)}
            assert ((a, value_a, b, value_b) in met) != alone_and_preempted
