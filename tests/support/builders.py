"""Short ways to make the plain data that tests feed to the scheduler."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from tandem_scheduler.core.types import SequenceRequest
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists
from tandem_shared.step_plan import PromptLogprobs, WorkerInfo

VOCAB_SIZE = 1000

GREEDY = RowSampling(temperature=0.0)


def worker_info(**changes: object) -> WorkerInfo:
    """The info of a small worker; `changes` are fields of WorkerInfo."""
    info = WorkerInfo(
        protocol_version=1,
        worker_instance_id="worker-1",
        fingerprint="fake-model",
        model="fake",
        dtype="float32",
        device="cpu",
        vocab_size=VOCAB_SIZE,
        max_model_len=4096,
        num_blocks=1025,
        block_size=16,
        max_num_rows=256,
        max_num_batched_tokens=8192,
    )
    return replace(info, **changes)  # type: ignore[arg-type]


def create_request(
    sequence_id: int = 0,
    prompt: Iterable[int] = (1, 2, 3),
    max_tokens: int = 8,
    *,
    sampling: RowSampling = GREEDY,
    lists: SamplingLists = NO_LISTS,
    stop_token_ids: Iterable[int] = (),
    priority: int = 0,
    cache_salt: str = "",
    deadline: float | None = None,
) -> SequenceRequest:
    """One greedy sequence that ends by length."""
    return SequenceRequest(
        sequence_id=sequence_id,
        prompt_token_ids=np.array(list(prompt), np.int32),
        max_tokens=max_tokens,
        sampling=sampling,
        lists=lists,
        stop_token_ids=frozenset(stop_token_ids),
        priority=priority,
        cache_salt=cache_salt,
        deadline=deadline,
    )


def create_requests(
    count: int,
    *,
    prompt_len: int = 10,
    max_tokens: int = 8,
    common_prefix: Sequence[int] = (),
    seed: int = 0,
) -> list[SequenceRequest]:
    """Sequences 0, 1, ... of random prompts, all starting with common_prefix; every second one is seeded."""
    rng = np.random.default_rng(seed)
    requests = []
    for index in range(count):
        prompt = [*common_prefix, *rng.integers(0, VOCAB_SIZE, prompt_len - len(common_prefix)).tolist()]
        sampling = RowSampling(temperature=1.0, seed=index) if index % 2 else GREEDY
        requests.append(create_request(index, prompt, max_tokens, sampling=sampling))
    return requests


def prompt_logprobs(
    row: int,
    first_position: int,
    logprobs: Sequence[float],
    ranks: Sequence[int],
    num_top: int = 0,
    top_token_ids: Sequence[int] = (),
    top_logprobs: Sequence[float] = (),
) -> PromptLogprobs:
    """A report on prompt tokens, of plain numbers."""
    return PromptLogprobs(
        row,
        first_position,
        np.array(logprobs, np.float32),
        np.array(ranks, np.int32),
        num_top,
        np.array(top_token_ids, np.int32),
        np.array(top_logprobs, np.float32),
    )


def plain(value: Any) -> Any:
    """Dataclasses as tuples and arrays as their type and numbers, so that they can be compared with ==."""
    if is_dataclass(value):
        return tuple(plain(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.tolist()
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value
