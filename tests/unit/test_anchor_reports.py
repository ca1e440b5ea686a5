"""What users of other engines ran into, each a test of ours. The docstrings name the reports.

Here are those that concern scheduling, against the core with the fake worker. The others:
- greedy forbidden (nano-vllm #249), no top-k and top-p (#260):
  unit/worker/runners/test_sampler.py, identity/test_identity.py
- no serving (nano-vllm #5, #244): contract/test_inference.py, e2e/test_grpcurl.py
- generation that goes on after the client has gone (mini-sglang #15, SGLang #37833):
  contract/test_streaming.py::test_a_cancelled_call_leaves_nothing_behind,
  contract/test_streaming.py::test_a_passed_deadline_leaves_nothing_behind,
  e2e/test_processes.py::test_a_cancelled_request_gives_its_blocks_back_while_others_run
- neither TLS nor auth (vLLM #38295, #45903): contract/test_server.py::test_with_a_certificate_only_tls_is_spoken,
  ::test_with_a_client_authority_a_client_must_show_its_certificate, ::test_interceptors_see_every_call
- discovery, readiness, drain, load (vLLM #47768): e2e/test_grpcurl.py::test_list_names_every_service,
  contract/test_worker_service.py::test_health_tells_liveness_from_readiness_and_can_be_watched,
  contract/test_control.py::test_drain_finishes_what_runs_and_refuses_what_comes,
  contract/test_control.py::test_load_counts_what_runs_and_what_ran
- fixed port and shared-memory name: e2e/test_processes.py::test_two_engines_share_a_host
- a shard that loses its state throws the batch away (TGI #283, #2316): e2e/test_worker_killed.py
"""

import pytest

from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import FinishReason, SchedulerConfig
from tandem_shared.errors import InvalidRequest
from tests.support.builders import create_request, create_requests, worker_info
from tests.support.engine import Engine, run
from tests.support.fake_worker import FakeRunner, expected_tokens

LARGE, FIRST, SECOND = range(100, 103)

BLOCK_SIZE = 16


def make_engine(num_blocks: int = 1025, max_model_len: int = 4096, **config: object) -> Engine:
    worker = worker_info(num_blocks=num_blocks, block_size=BLOCK_SIZE, max_model_len=max_model_len)
    return Engine(Scheduler(SchedulerConfig(**config), worker), FakeRunner(worker))  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt_len", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_prompt_exactly_one_block_long(prompt_len: int, depth: int) -> None:
    """nano-vllm #114, #117, #199: a prompt exactly one block long crashes."""
    engine = make_engine(max_plans_in_flight=depth)
    request = create_request(prompt=range(prompt_len), max_tokens=2 * BLOCK_SIZE + 1)
    assert run(engine.scheduler, engine.runner, [request]) == {request.sequence_id: expected_tokens(request)}


@pytest.mark.parametrize("num_blocks_in_prompt", [1, 2, 5])
def test_wholly_cached_prompt_computes_its_last_token(num_blocks_in_prompt: int) -> None:
    """nano-vllm #114, #117, #199: a prompt that is wholly in the prefix cache crashes."""
    engine = make_engine()
    num_tokens = num_blocks_in_prompt * BLOCK_SIZE
    request = create_request(prompt=range(num_tokens), max_tokens=20)
    for num_cached_tokens in (0, num_tokens):
        engine.add(request)
        plan = engine.launch()
        assert plan is not None
        assert plan.added_rows[0].num_cached_tokens == num_cached_tokens
        assert plan.chunk_num_tokens.tolist() == [1 if num_cached_tokens else num_tokens]
        engine.drain()
        assert engine.outputs[request.sequence_id] == expected_tokens(request)
        assert engine.finished[request.sequence_id].num_cached_tokens == num_cached_tokens


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_preempted_sequence_finds_its_own_blocks_in_the_prefix_cache(depth: int) -> None:
    """nano-vllm #211, #144: the re-prefill after a preemption hits the prefix cache and crashes, or passes for a
    decode with no queries.
    """
    engine = make_engine(num_blocks=9, max_plans_in_flight=depth)
    requests = create_requests(3, prompt_len=BLOCK_SIZE, max_tokens=4 * BLOCK_SIZE)
    engine.add(*requests)
    resumed = []
    while engine.scheduler.num_unfinished:
        plan = engine.launch()
        if plan is None:
            engine.deliver()
            continue
        resumed += [row for row in plan.added_rows if len(row.token_ids) > row.num_prompt_tokens]
    assert engine.scheduler.load().num_preemptions > 0
    assert any(row.num_cached_tokens > 0 for row in resumed)
    assert engine.outputs == {request.sequence_id: expected_tokens(request) for request in requests}


@pytest.mark.parametrize("is_long_prompt", [True, False])
def test_request_larger_than_the_pool_is_refused_and_the_next_works(is_long_prompt: bool) -> None:
    """nano-vllm #277, vLLM #39734: one request larger than the KV pool kills the engine, or hangs."""
    engine = make_engine(num_blocks=5)
    num_slots = 4 * BLOCK_SIZE
    prompt_len, max_tokens = (num_slots + 1, 1) if is_long_prompt else (10, num_slots - 10 + 2)
    with pytest.raises(InvalidRequest, match="KV pool"):
        engine.add(create_request(LARGE, prompt=range(prompt_len), max_tokens=max_tokens))
    assert engine.scheduler.num_unfinished == 0
    # The last token is never stored, so the largest request that fits is one longer than the pool.
    largest = create_request(prompt=range(10), max_tokens=num_slots - 10 + 1)
    engine.add(largest)
    engine.drain()
    assert engine.outputs[largest.sequence_id] == expected_tokens(largest)


def test_equal_prefixes_in_one_step_share_their_blocks() -> None:
    """nano-vllm #219, #243: equal prefixes that are prefilled in the same step are cached twice."""
    engine = make_engine()
    prefix = range(3 * BLOCK_SIZE)
    requests = create_requests(4, prompt_len=3 * BLOCK_SIZE + 5, max_tokens=8, common_prefix=prefix)
    engine.add(*requests)
    plan = engine.launch()
    assert plan is not None
    tables = [row.block_ids.tolist() for row in plan.added_rows]
    assert all(table[:3] == tables[0][:3] for table in tables)
    assert plan.chunk_num_tokens.tolist() == [len(prefix) + 5, 5, 5, 5]
    assert engine.scheduler.load().num_used_blocks == 3 + 4
    engine.drain()
    assert engine.outputs == {request.sequence_id: expected_tokens(request) for request in requests}


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(101, 1), (100, 1), (60, 41), (1, 100)])
def test_prompt_longer_than_the_context_is_refused(prompt_len: int, max_tokens: int) -> None:
    """Prompts longer than max_model_len crash at decode (nano-vllm); mini-sglang drops them, so callers wait for
    ever.
    """
    engine = make_engine(max_model_len=100)
    with pytest.raises(InvalidRequest, match="context of 100"):
        engine.add(create_request(prompt=range(prompt_len), max_tokens=max_tokens))
    just_fits = create_request(prompt=range(60), max_tokens=40)
    engine.add(just_fits)
    engine.drain()
    assert engine.finished[just_fits.sequence_id].reason is FinishReason.LENGTH
    assert engine.outputs[just_fits.sequence_id] == expected_tokens(just_fits)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_blocks_freed_while_a_step_in_flight_reads_them(depth: int) -> None:
    """vllm-ascend #16315: with asynchronous scheduling, blocks are freed and handed on while a step in flight still
    reads them. Plans run in order, so here they may be: the next plan reuses them and nothing reads a foreign slot.
    """
    engine = make_engine(num_blocks=5, max_plans_in_flight=depth, enable_prefix_caching=False)
    first = create_request(FIRST, prompt=range(40), max_tokens=20)
    second = create_request(SECOND, prompt=range(100, 150), max_tokens=10)
    engine.add(first, second)
    for _ in range(depth - 1):
        assert engine.launch() is not None
    assert engine.scheduler.abort(FIRST)
    assert engine.scheduler.load().num_used_blocks == 0
    plan = engine.launch()
    assert plan is not None and len(engine.in_flight) == depth
    assert [row.sequence_id for row in plan.added_rows] == [SECOND]
    engine.drain()
    assert engine.outputs[SECOND] == expected_tokens(second)
    assert engine.outputs[FIRST] == []


def test_no_preemption_thrash() -> None:
    """vllm-ascend #16315: freeing blocks late makes sequences preempt each other over and over. Under a pool that
    holds a quarter of the work, each sequence is preempted a few times at most, and the oldest never.
    """
    engine = make_engine(num_blocks=33, max_plans_in_flight=2, enable_prefix_caching=False)
    requests = create_requests(16, prompt_len=2 * BLOCK_SIZE, max_tokens=6 * BLOCK_SIZE)
    engine.add(*requests)
    num_entries = dict.fromkeys(engine.outputs, 0)
    while engine.scheduler.num_unfinished:
        plan = engine.launch()
        if plan is None:
            engine.deliver()
            continue
        for row in plan.added_rows:
            num_entries[row.sequence_id] += 1
    assert engine.scheduler.load().num_preemptions > 0
    assert num_entries[0] == 1
    assert max(num_entries.values()) <= 6, num_entries
    assert engine.outputs == {request.sequence_id: expected_tokens(request) for request in requests}
