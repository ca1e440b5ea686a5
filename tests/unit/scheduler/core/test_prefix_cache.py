"""Which blocks the prefix cache shares, and which it must not hold because a row had a fault."""

import numpy as np
import pytest

from tandem_scheduler.core.types import FinishReason
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import FAULT_GRAMMAR, FAULT_NO_TOKEN
from tests.support.builders import create_request, create_requests, worker_info
from tests.support.fake_worker import expected_tokens
from tests.unit.scheduler.core.engines import launch, make_engine

A, B = range(100, 102)


def test_generated_text_is_cached_too() -> None:
    engine = make_engine(worker_info(block_size=4))
    first = create_request(prompt=range(6), max_tokens=13)
    engine.add(first)
    engine.drain()
    # The next turn continues the conversation.
    text = [*range(6), *expected_tokens(first)]
    assert engine.scheduler.longest_prefix(np.array(text, np.int32)) == 16
    second = create_request(1, prompt=[*text, 5, 5])
    engine.add(second)
    engine.drain()
    assert engine.finished[1].num_cached_tokens == 16
    assert engine.outputs[1] == expected_tokens(second)


def test_hits_are_counted_with_the_prompts_that_could_hit() -> None:
    engine = make_engine(worker_info(block_size=4), max_num_seqs=1)
    counts = []
    for index in range(2):
        engine.add(create_request(index, prompt=range(10), max_tokens=3))
    for _ in range(2):
        while not engine.finished.get(len(counts)):
            engine.launch()
            engine.deliver()
        load = engine.scheduler.load()
        counts.append((load.num_prompt_tokens, load.num_admitted_prompt_tokens, load.num_cached_prompt_tokens))
    # The second prompt waits for the first one's end, and finds two blocks of it.
    assert counts == [(20, 10, 0), (20, 20, 8)]


def test_salts_keep_caches_apart() -> None:
    engine = make_engine(worker_info(block_size=4))
    for index, (salt, num_cached) in enumerate([("a", 0), ("b", 0), ("a", 8), ("", 0)]):
        engine.add(create_request(index, prompt=range(10), cache_salt=salt))
        engine.drain()
        assert engine.finished[index].num_cached_tokens == num_cached


def test_reset_forgets_what_nobody_uses() -> None:
    engine = make_engine(worker_info(block_size=4))
    engine.add(create_request(prompt=range(10), max_tokens=1))
    engine.drain()
    assert engine.scheduler.reset_prefix_cache() == 2
    assert engine.scheduler.longest_prefix(np.arange(10, dtype=np.int32)) == 0
    assert engine.scheduler.load().num_free_blocks == 1024


def test_a_row_fault_ends_one_sequence_and_its_blocks_are_not_trusted() -> None:
    engine = make_engine(worker_info(block_size=4))
    requests = create_requests(3, prompt_len=12, max_tokens=6)
    engine.runner.faulty.add(1)  # type: ignore[attr-defined]
    engine.add(*requests)
    engine.drain()
    finished = engine.finished.pop(1)
    assert finished.reason is FinishReason.ERROR and finished.error
    assert engine.outputs.pop(1) == []
    assert engine.outputs == {r.sequence_id: expected_tokens(r) for r in requests if r.sequence_id != 1}
    assert engine.scheduler.longest_prefix(requests[1].prompt_token_ids) == 0


@pytest.mark.parametrize("code", [FAULT_GRAMMAR, FAULT_NO_TOKEN])
def test_a_fault_of_the_request_leaves_its_blocks_in_the_cache(code: int) -> None:
    engine = make_engine(worker_info(block_size=4))
    engine.runner.faulty.add(A)  # type: ignore[attr-defined]
    engine.runner.fault_codes[A] = code  # type: ignore[attr-defined]
    engine.add(create_request(A, range(12)))
    engine.drain()
    assert engine.finished[A].reason is FinishReason.ERROR and engine.finished[A].error_field
    assert engine.scheduler.longest_prefix(np.arange(12, dtype=np.int32)) == 12


@pytest.mark.parametrize("how", ["drained", "aborted"])
def test_what_a_faulty_row_left_behind_is_not_trusted_though_another_row_shares_it(how: str) -> None:
    engine = make_engine(worker_info(block_size=4), max_plans_in_flight=3)
    prompt = list(range(8))
    faulty = create_request(A, prompt, 1 if how == "drained" else 9)
    engine.runner.faulty.add(A)  # type: ignore[attr-defined]
    engine.add(faulty)
    launch(engine)
    if how == "aborted":
        engine.scheduler.abort(A)
    # This sequence was admitted before the fault was known and shares the blocks. Nothing says that it is faulty
    # itself.
    engine.add(create_request(B, prompt, 9))
    assert launch(engine).added_rows[0].num_cached_tokens == 8
    engine.deliver()
    assert engine.scheduler.longest_prefix(np.array(prompt, np.int32)) == 0
    engine.scheduler.check_integrity()


def test_a_report_on_a_row_with_a_fault_is_dropped() -> None:
    engine = make_engine()
    engine.add(create_request(A, sampling=RowSampling(num_logprobs=2)), create_request(B))
    engine.runner.faulty.add(A)  # type: ignore[attr-defined]
    launch(engine)
    outputs = engine.deliver()
    assert not outputs.logprobs and [finished.sequence_id for finished in outputs.finished] == [A]
