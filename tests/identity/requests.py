"""The requests of the identity suite: greedy and seeded, of which two thirds ask for more than that."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from tandem_scheduler.core.types import SequenceRequest
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import SamplingLists

NUM_REQUESTS = 64
NUM_OUTPUT_TOKENS = 40


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
    """Requests of which half are greedy and half seeded, with every combination of truncations. Every third is sampled
    from the model's own logits; the others ask for some of the changes. Log-probabilities are asked by all sorts.
    """
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
        request = SequenceRequest(index, prompt, NUM_OUTPUT_TOKENS, sampling)
        rng = np.random.default_rng(index)
        if index % 3:
            request = with_changes(request, rng, vocab_size)
        requests.append(with_reports(request, rng, vocab_size))
    return requests


def with_changes(request: SequenceRequest, rng: np.random.Generator, vocab_size: int) -> SequenceRequest:
    """The request with a random choice of the fields that change logits."""
    numbers: dict[str, Any] = {}
    lists: dict[str, Any] = {}

    def add_min_tokens() -> None:
        numbers["min_tokens"] = int(rng.integers(1, 20))
        lists["stop_token_ids"] = random_ids(rng, vocab_size, 24)

    def add_bad_words() -> None:
        # Words of few tokens, and no other tokens, so that their beginnings are in the output again and again.
        few = random_ids(rng, vocab_size, 24)
        lists["allowed_token_ids"] = few
        words = [tuple(rng.choice(few, int(rng.integers(2, 4))).tolist()) for _ in range(100)]
        lists["bad_words"] = (*words, few[:1])

    changes: list[Callable[[], None]] = [
        lambda: numbers.update(presence_penalty=float(rng.choice([-0.5, 1.0, 2.0]))),
        lambda: numbers.update(frequency_penalty=float(rng.choice([-0.25, 0.5, 2.0]))),
        lambda: numbers.update(repetition_penalty=float(rng.choice([0.875, 1.25, 2.0]))),
        lambda: lists.update(allowed_token_ids=random_ids(rng, vocab_size, vocab_size // 2)),
        lambda: lists.update(
            logit_bias=tuple((token_id, rng.uniform(-9, 9)) for token_id in random_ids(rng, vocab_size, 40))
        ),
        add_min_tokens,
        add_bad_words,
    ]
    for number in rng.choice(len(changes), int(rng.integers(1, 5)), replace=False):
        changes[number]()
    stop_token_ids = frozenset(lists.get("stop_token_ids", ()))
    sampling = replace(request.sampling, **numbers)
    return replace(request, sampling=sampling, lists=SamplingLists(**lists), stop_token_ids=stop_token_ids)


def with_reports(request: SequenceRequest, rng: np.random.Generator, vocab_size: int) -> SequenceRequest:
    """The request with a random choice of log-probabilities."""
    numbers = {name: int(rng.integers(0, 6)) for name in ("num_logprobs", "num_prompt_logprobs") if rng.random() < 0.4}
    lists = request.lists
    if rng.random() < 0.3:
        lists = replace(lists, logprob_token_ids=random_ids(rng, vocab_size, 3))
    return replace(request, sampling=replace(request.sampling, **numbers), lists=lists)


def random_ids(rng: np.random.Generator, vocab_size: int, count: int) -> tuple[int, ...]:
    return tuple(rng.choice(vocab_size, count, replace=False).tolist())
