"""What the scheduler core puts into a step plan, and how it takes the result."""

import pytest

from tandem_scheduler.core.types import FinishReason
from tandem_shared.errors import ProtocolError
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import RowLogprobs, StepPlan, StepResult
from tests.support.builders import create_request, create_requests, worker_info
from tests.support.engine import run
from tests.support.fake_worker import expected_tokens
from tests.unit.scheduler.core.engines import added_ids, chunks, expected, launch, make_engine

A, B, C, LONG = range(100, 104)


def test_decoding_rows_and_prompt_chunks_share_one_budget() -> None:
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=10, enable_prefix_caching=False)
    requests = [create_request(A, range(6)), create_request(B, range(20, 36)), create_request(C, range(3))]
    engine.add(*requests)
    assert [chunks(launch(engine)), chunks(launch(engine))] == [{0: 6, 1: 4}, {1: 9}]
    engine.deliver()
    # The plan has the last 3 tokens of B's prompt, decodes A, and admits C.
    assert chunks(launch(engine)) == {1: 3, 2: 3}
    engine.drain()
    assert engine.outputs == expected(requests)


@pytest.mark.parametrize("max_chunk_tokens", [1, 3, 7])
def test_chunks_are_bounded(max_chunk_tokens: int) -> None:
    engine = make_engine(max_chunk_tokens=max_chunk_tokens)
    requests = create_requests(3, prompt_len=15)
    engine.add(*requests)
    plans = [launch(engine), launch(engine)]
    assert all(count <= max_chunk_tokens for plan in plans for count in chunks(plan).values())
    engine.drain()
    assert engine.outputs == expected(requests)


def test_a_steady_decode_plan_is_empty() -> None:
    engine = make_engine()
    engine.add(create_request(prompt=range(3), max_tokens=10))
    launch(engine)
    plan = launch(engine)
    assert not plan.added_rows
    assert not sum(len(getattr(plan, name)) for name in StepPlan.__slots__ if name not in ("step_id", "added_rows"))


def test_prompt_tokens_are_limited_from_outside_and_decoding_rows_are_not() -> None:
    engine = make_engine()
    engine.add(*create_requests(20, prompt_len=4, max_tokens=30))
    launch(engine)
    engine.deliver()
    engine.add(create_request(LONG, range(100), 5))
    counts = []
    while engine.outputs[LONG] == []:
        plan = engine.scheduler.schedule(7)
        if plan is not None:
            engine.in_flight.append(engine.runner.execute(plan))
            counts.append(int(plan.chunk_num_tokens.sum()))
        else:
            engine.deliver()
    assert counts[:15] == [7] * 14 + [2]
    engine.drain()
    assert engine.outputs[LONG] == expected_tokens(create_request(LONG, range(100), 5))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_plans_in_flight_are_bounded(depth: int) -> None:
    engine = make_engine(max_plans_in_flight=depth)
    engine.add(create_request(max_tokens=20))
    for _ in range(depth):
        launch(engine)
    assert engine.launch() is None
    engine.deliver()
    assert launch(engine).step_id == depth + 1


def test_ends_by_length_are_predicted() -> None:
    engine = make_engine(max_plans_in_flight=4)
    engine.add(create_request(max_tokens=2))
    launch(engine)
    launch(engine)
    assert engine.launch() is None
    assert engine.scheduler.load().num_used_blocks == 0
    engine.drain()
    assert engine.scheduler.load().num_overshoot_tokens == 0


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_stop_id_overshoots_by_the_depth_and_nobody_sees_it(depth: int) -> None:
    engine = make_engine(max_plans_in_flight=depth)
    tokens = expected_tokens(create_request(max_tokens=50))
    request = create_request(max_tokens=50, stop_token_ids=[tokens[7]])
    engine.add(request)
    engine.drain()
    assert engine.outputs[request.sequence_id] == tokens[:8]
    finished = engine.finished[request.sequence_id]
    assert (finished.reason, finished.stop_token_id) == (FinishReason.STOP, tokens[7])
    load = engine.scheduler.load()
    assert (load.num_output_tokens, load.num_overshoot_tokens) == (8, depth - 1)


def test_a_late_stop_takes_tokens_back_and_frees_the_blocks() -> None:
    engine = make_engine(max_plans_in_flight=2)
    engine.add(create_request(max_tokens=50))
    for _ in range(10):
        engine.step()
    assert engine.scheduler.stop(0, 7)
    load = engine.scheduler.load()
    assert (load.num_output_tokens, load.num_overshoot_tokens, load.num_used_blocks) == (7, 3, 0)
    engine.drain()
    assert len(engine.outputs[0]) == 10
    assert not engine.scheduler.stop(0, 7)


def test_an_aborted_sequence_is_out_of_the_next_plan_and_its_id_is_free() -> None:
    engine = make_engine(max_plans_in_flight=3)
    engine.add(create_request(max_tokens=50))
    launch(engine)
    launch(engine)
    assert engine.scheduler.abort(0)
    assert engine.scheduler.load().num_used_blocks == 0
    again = create_request(prompt=[9, 8, 7], max_tokens=5)
    engine.add(again)
    plan = launch(engine)
    assert plan.removed_rows.tolist() == [0] and added_ids(plan) == [0]
    engine.drain()
    assert engine.outputs[0] == expected_tokens(again)


@pytest.mark.parametrize(
    "result",
    [
        StepResult(2, [1], [5]),
        StepResult(1, [1, 1], [5, 5]),
        StepResult(1, [1], []),
        StepResult(1, [0], []),
        StepResult(1, [1], [5], logprobs=(RowLogprobs(3, -1.0),)),
    ],
    ids=["other step", "too many rows", "too few ids", "no fault", "other row"],
)
def test_a_result_that_does_not_fit_its_plan_is_refused_whole(result: StepResult) -> None:
    engine = make_engine()
    engine.add(create_request())
    launch(engine)
    with pytest.raises(ProtocolError):
        engine.scheduler.update(result)
    engine.drain()
    assert engine.outputs[0] == expected_tokens(create_request())


def test_logprobs_reach_the_sequence_that_asked() -> None:
    engine = make_engine()
    engine.add(create_request(A), create_request(B, sampling=RowSampling(num_logprobs=2)))
    launch(engine)
    outputs = engine.deliver()
    assert outputs.logprobs.keys() == {B}
    assert outputs.logprobs[B].top_token_ids[0] == engine.outputs[B][0]


def test_nothing_keeps_a_scheduler_from_being_used_again() -> None:
    """run() twice on one scheduler, which keeps its rows, ids and cache."""
    engine = make_engine(worker_info(num_blocks=12), max_num_seqs=4)
    requests = create_requests(10, prompt_len=40, max_tokens=30, common_prefix=range(16))
    for _ in range(2):
        assert run(engine.scheduler, engine.runner, requests) == expected(requests)
    engine.scheduler.check_integrity()
    assert engine.scheduler.load().num_used_blocks == 0
