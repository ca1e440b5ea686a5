"""Rows with grammars have the tokens that they have alone: among others, preempted, at any depth, on several ranks."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tandem_scheduler.core.types import SequenceRequest
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import Grammar, SamplingLists
from tandem_shared.structured_output import choice_grammar, json_schema_grammar, lark_grammar, regex_grammar
from tests.identity.ranks import run_ranks
from tests.identity.runs import Case, Run, assert_equal_runs, execute
from tests.support.model_factory import save_random_model
from tests.support.tokenizers import EMBEDDED, embedded

NUM_REQUESTS = 32
EOS = 1017
COMMA = 11
GRAMMARS = [
    regex_grammar("[a-z]{2,12}( [a-z]{2,12}){0,5}[.!]?"),
    choice_grammar(["to be", "to be or not", "to be or not to be", "être", "日本"]),
    lark_grammar('start: "(" start* ")" | /[0-9]{1,3}/'),
    json_schema_grammar('{"type": "array", "items": {"enum": ["a", 1, null, [true]]}}'),
    json_schema_grammar(
        json.dumps({"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}})
    ),
]


def make_requests() -> list[SequenceRequest]:
    """Every fourth request has no grammar. Among the others are all grammars, each with a mixture of other fields."""
    requests = []
    for index in range(NUM_REQUESTS):
        rng = np.random.default_rng(index)
        prompt = rng.integers(0, 1000, int(rng.integers(30, 90))).astype(np.int32)
        sampling = RowSampling(
            temperature=float(rng.choice([0.0, 0.7, 1.5])),
            top_k=int(rng.choice([0, 20])),
            top_p=float(rng.choice([1.0, 0.9])),
            presence_penalty=float(rng.choice([0.0, 0.0, 1.0])),
            seed=index,
            min_tokens=int(rng.choice([0, 0, 15])),
            num_logprobs=2 if rng.random() < 0.3 else None,
        )
        lists = SamplingLists(stop_token_ids=(EOS,))
        if index % 4:
            grammar = Grammar(
                GRAMMARS[index % len(GRAMMARS)],
                # A token that a model of random weights soon gives, as it is made likely.
                start_after_token_id=COMMA if rng.random() < 0.3 else None,
                ignore_eos=bool(rng.random() < 0.5),
            )
            lists = replace(lists, grammar=grammar, logit_bias=((COMMA, 3.0),))
        request = SequenceRequest(index, prompt, 40, sampling, frozenset({EOS}), lists=lists)
        requests.append(request)
    return requests


@dataclass(frozen=True)
class Truth:
    folder: Path
    requests: list[SequenceRequest]
    run: Run


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """The requests one by one, at depth 1."""
    folder = save_random_model(
        tmp_path_factory.mktemp("model"), dtype="float64", seed=3, vocab_size=1024, eos_token_id=EOS
    )
    shutil.copy(EMBEDDED, folder)
    requests = make_requests()
    return Truth(folder, requests, execute(folder, Case(), requests))


def test_outputs_follow_their_grammars(truth: Truth) -> None:
    """Each choice that has ended is one of the texts. tests/e2e/test_structured_output.py judges other forms."""
    tokenizer, num_ended = embedded(), 0
    for request in truth.requests:
        tokens, grammar = truth.run.outputs[request.sequence_id], request.lists.grammar
        if grammar is None or grammar.text != GRAMMARS[1] or tokens[-1] != EOS:
            continue
        start = 0 if grammar.start_after_token_id is None else tokens.index(COMMA) + 1
        text = tokenizer.decode(tokens[start:-1])
        assert text in ["to be", "to be or not", "to be or not to be", "être", "日本"]
        num_ended += 1
    assert num_ended >= 2


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=64, prefix_caching=True, chunk=16, preempted=True, depth=4),
        Case(batch=64, chunk=7, depth=2),
        pytest.param(Case(batch=64, preempted=True), marks=pytest.mark.slow),
        pytest.param(Case(batch=64, depth=4), marks=pytest.mark.slow),
        pytest.param(Case(depth=4, prefix_caching=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_tokens(case: Case, truth: Truth) -> None:
    run = execute(truth.folder, case, truth.requests)
    assert_equal_runs(run, truth.run)
    assert (run.load.num_preemptions > 0) == (run.num_resumes > 0) == case.preempted
    assert (run.load.num_overshoot_tokens > 0) == (case.depth > 1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_the_same_tokens(size: int, truth: Truth, tmp_path: Path) -> None:
    case = Case(batch=64, prefix_caching=True, chunk=16, preempted=True, depth=2)
    for run in run_ranks(size, truth.folder, case, truth.requests, tmp_path):
        assert_equal_runs(run, truth.run)
