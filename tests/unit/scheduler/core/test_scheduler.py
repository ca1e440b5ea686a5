"""The scheduler core's rules one by one; what holds under any order of events is in test_scheduler_properties.py."""

from collections import Counter

import numpy as np
import pytest

from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.suspects import MAX_FAILED_TRIALS, MAX_VANISHED_TRIALS, PROBE_ID
from tandem_scheduler.core.types import FinishReason, SchedulerConfig, SequenceRequest
from tandem_shared.errors import ConfigError, InvalidRequest, ProtocolError, QueueFull, RequestIdInUse
from tandem_shared.step_plan import RowLogprobs, RowSampling, StepPlan, StepResult, WorkerInfo
from tests.support.builders import create_request, create_requests, worker_info
from tests.support.engine import Engine, run
from tests.support.fake_worker import FakeRunner, expected_tokens

A, B, C, FIRST, SECOND, THIRD, LATE, LOW, OLD, NEW, MORE, LARGE, SMALL, LONG = range(100, 114)


def make_engine(worker: WorkerInfo | None = None, **config: object) -> Engine:
    runner = FakeRunner(worker)
    return Engine(Scheduler(SchedulerConfig(**config), runner.info), runner)  # type: ignore[arg-type]


def launch(engine: Engine) -> StepPlan:
    plan = engine.launch()
    assert plan is not None
    return plan


def added_ids(plan: StepPlan) -> list[int]:
    return [row.sequence_id for row in plan.added_rows]


def chunks(plan: StepPlan) -> dict[int, int]:
    return dict(zip(plan.chunk_rows.tolist(), plan.chunk_num_tokens.tolist(), strict=True))


def expected(requests: list[SequenceRequest]) -> dict[int, list[int]]:
    return {request.sequence_id: expected_tokens(request) for request in requests}


# The budget


def test_decoding_rows_and_prompt_chunks_share_one_budget() -> None:
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=10, enable_prefix_caching=False)
    requests = [create_request(A, range(6)), create_request(B, range(20, 36)), create_request(C, range(3))]
    engine.add(*requests)
    assert [chunks(launch(engine)), chunks(launch(engine))] == [{0: 6, 1: 4}, {1: 9}]
    engine.deliver()
    # The last 3 of b; a decodes; c enters.
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


# Plans in flight


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


def test_a_live_id_is_refused() -> None:
    engine = make_engine()
    engine.add(create_request())
    with pytest.raises(RequestIdInUse):
        engine.scheduler.add(create_request(prompt=[5]))
    engine.drain()
    assert engine.outputs[0] == expected_tokens(create_request())


# Order


def test_priority_then_arrival() -> None:
    engine = make_engine(max_num_seqs=1)
    for name, priority in ((LATE, 1), (SECOND, 0), (THIRD, 0), (FIRST, -1)):
        engine.add(create_request(name, priority=priority, max_tokens=1))
    order = []
    while engine.scheduler.num_unfinished:
        plan = engine.launch()
        order += added_ids(plan) if plan else []
        engine.deliver()
    assert order == [FIRST, SECOND, THIRD, LATE]


def test_the_last_in_order_is_preempted_and_keeps_its_place() -> None:
    worker = worker_info(block_size=4, num_blocks=9)
    engine = make_engine(worker, max_num_seqs=3, enable_prefix_caching=False, max_plans_in_flight=1)
    requests = [
        create_request(LOW, range(8), 20, priority=5),
        create_request(OLD, range(10, 18), 20),
        create_request(NEW, range(20, 28), 4),
    ]
    engine.add(*requests)
    admitted: Counter[int] = Counter()
    while engine.scheduler.num_unfinished:
        plan = engine.launch()
        admitted.update(added_ids(plan) if plan else [])
        engine.deliver()
    assert admitted[OLD] == admitted[NEW] == 1 < admitted[LOW]
    assert engine.outputs == expected(requests)


def test_the_queue_is_bounded_and_preempted_sequences_dont_count() -> None:
    engine = make_engine(max_num_waiting=2)
    engine.add(*create_requests(2))
    with pytest.raises(QueueFull):
        engine.scheduler.add(create_request(MORE))
    launch(engine)
    engine.scheduler.add(create_request(MORE))
    engine.scheduler.check_integrity()


def test_what_waits_past_its_deadline_ends_and_is_not_started() -> None:
    engine = make_engine(max_num_seqs=1)
    running, late, timely = create_request(A, deadline=1.0), create_request(B, deadline=2.0), create_request(C)
    engine.add(running, late, timely)
    launch(engine)
    assert engine.scheduler.expire(1.5) == [], "what runs is its reader's to end"
    [ended] = engine.scheduler.expire(2.0)
    assert (ended.sequence_id, ended.reason, ended.num_output_tokens) == (B, FinishReason.EXPIRED, 0)
    assert engine.scheduler.expire(9.0) == []
    engine.drain()
    assert engine.outputs == expected([running, timely]) | {B: []}
    engine.scheduler.check_integrity()


def test_a_preempted_sequence_is_not_started_again_after_its_deadline() -> None:
    engine = make_engine(worker_info(block_size=4, num_blocks=6), admission_watermark=0.0)
    old, new = create_request(OLD, range(4), 12), create_request(NEW, range(4), 12, deadline=3.0)
    engine.add(old, new)
    while not engine.scheduler.load().num_preemptions:
        engine.step()
    assert [end.sequence_id for end in engine.scheduler.expire(3.0)] == [NEW]
    engine.drain()
    assert engine.outputs[OLD] == expected_tokens(old)
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("deadline", [None, 3.0])
def test_what_is_preempted_is_not_started_again_by_the_same_plan(deadline: float | None) -> None:
    """It shares its prompt's blocks with the other, and its own are cached, so it would fit at once."""
    engine = make_engine(worker_info(block_size=4, num_blocks=6), admission_watermark=0.0, max_plans_in_flight=1)
    old, new = create_request(OLD, range(8), 12), create_request(NEW, range(8), 12, deadline=deadline)
    engine.add(old, new)
    plan = launch(engine)
    assert added_ids(plan) == [OLD, NEW]
    while not engine.scheduler.load().num_preemptions:
        engine.deliver()
        # A deadline has passed here, and the end of the call is still under way.
        assert engine.scheduler.expire(3.0) == []
        plan = launch(engine)
    assert added_ids(plan) == []
    is_late = deadline is not None
    assert [end.sequence_id for end in engine.scheduler.expire(3.0)] == ([NEW] if is_late else [])
    engine.drain()
    assert engine.outputs[OLD] == expected_tokens(old)
    assert is_late or engine.outputs[NEW] == expected_tokens(new)


def test_sequences_that_ended_do_not_gather_behind_one_that_waits() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add(*create_requests(2, max_tokens=1000))
    launch(engine)
    for sequence_id in range(2, 1000):
        engine.add(create_request(sequence_id))
        engine.scheduler.abort(sequence_id)
    assert len(engine.scheduler._queue.entries) < 10


def test_an_admission_leaves_the_watermark_free() -> None:
    worker = worker_info(block_size=4, num_blocks=11)
    engine = make_engine(worker, admission_watermark=0.3)
    engine.add(create_request(A, range(16)), create_request(B, range(20, 36)))
    assert added_ids(launch(engine)) == [A]
    alone = make_engine(worker, admission_watermark=0.3)
    alone.add(create_request(prompt=range(39), max_tokens=2))
    assert added_ids(launch(alone)) == [0]


# What is refused


@pytest.mark.parametrize(
    "request_",
    [create_request(prompt=[]), create_request(max_tokens=0), create_request(max_tokens=4096)],
    ids=["empty", "no tokens", "too long"],
)
def test_what_can_never_run_is_refused(request_: SequenceRequest) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest):
        engine.scheduler.add(request_)
    assert engine.scheduler.num_unfinished == 0


@pytest.mark.parametrize(
    "change",
    [
        {"max_num_seqs": 0},
        {"max_num_seqs": 10, "max_num_batched_tokens": 9},
        {"max_chunk_tokens": 0},
        {"max_plans_in_flight": 5},
        {"max_plans_in_flight": 0},
        {"max_num_waiting": 0},
        {"admission_watermark": 1.0},
    ],
)
def test_a_wrong_config_names_the_key(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change)) if len(change) == 1 else "max_num_batched_tokens"):
        SchedulerConfig(**change)  # type: ignore[arg-type]


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


# Prefix cache


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


# Faults and losses


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
    # Admitted before the fault is known, it shares the blocks; it is not faulty itself, as far as anybody knows.
    engine.add(create_request(B, prompt, 9))
    assert launch(engine).added_rows[0].num_cached_tokens == 8
    engine.deliver()
    assert engine.scheduler.longest_prefix(np.array(prompt, np.int32)) == 0
    engine.scheduler.check_integrity()


def test_logprobs_reach_the_sequence_that_asked() -> None:
    engine = make_engine()
    engine.add(create_request(A), create_request(B, sampling=RowSampling(num_logprobs=2)))
    launch(engine)
    outputs = engine.deliver()
    assert outputs.logprobs.keys() == {B}
    assert outputs.logprobs[B].top_token_ids[0] == engine.outputs[B][0]


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("num_delivered", range(6))
def test_a_lost_worker_loses_and_repeats_no_token(num_delivered: int, block_size: int) -> None:
    engine = make_engine(max_plans_in_flight=3)
    requests = create_requests(5, prompt_len=20, max_tokens=9)
    engine.add(*requests)
    for _ in range(num_delivered):
        engine.step()
    engine.lose_worker()
    assert engine.scheduler.schedule() is None
    assert engine.scheduler.longest_prefix(requests[0].prompt_token_ids) == 0
    late = create_request(LATE)
    engine.add(late)
    engine.attach_worker(FakeRunner(worker_info(block_size=block_size, num_blocks=1024 // block_size)))
    assert launch(engine).step_id == 1
    engine.drain()
    assert engine.outputs == expected([*requests, late])


def test_a_worker_of_another_block_size_has_a_prefix_cache_of_its_own() -> None:
    engine = make_engine(worker_info(block_size=16))
    request = create_request(prompt=range(40), max_tokens=20)
    engine.add(request)
    engine.step()
    engine.lose_worker()
    engine.attach_worker(FakeRunner(worker_info(block_size=4)))
    engine.drain()
    assert engine.scheduler.longest_prefix(request.prompt_token_ids) == 40
    assert engine.outputs[0] == expected_tokens(request)


def test_a_smaller_worker_ends_what_no_longer_fits() -> None:
    engine = make_engine()
    large, small = create_request(LARGE, range(100), 50), create_request(SMALL, range(10), 20)
    engine.add(large, small)
    engine.step()
    engine.lose_worker()
    engine.attach_worker(FakeRunner(worker_info(num_blocks=5)))
    assert engine.finished[LARGE].reason is FinishReason.ERROR
    engine.drain()
    assert engine.outputs[SMALL] == expected_tokens(small)


def run_with_poison(engine: Engine, poison: set[int], failure: str = "") -> list[set[int]]:
    """Runs to the end; the worker dies in every step that computes one of `poison`. Gives for each loss the
    sequences that were present and had brought no token since they were admitted.
    """
    unproven_at_losses = []
    num_tokens_at_admission: dict[int, int] = {}
    while engine.scheduler.num_unfinished:
        plan = engine.launch()
        for sequence_id in added_ids(plan) if plan else []:
            num_tokens_at_admission[sequence_id] = len(engine.outputs.get(sequence_id, ()))
        present = {row.sequence_id for row in engine.runner.rows.values()}  # type: ignore[attr-defined]
        if present & poison:
            unproven_at_losses.append(
                {s for s in present - {PROBE_ID} if len(engine.outputs[s]) == num_tokens_at_admission[s]}
            )
            engine.lose_worker(failure)
            engine.attach_worker(FakeRunner(engine.runner.info))
        elif plan is None:
            engine.deliver()
    return unproven_at_losses


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("poison", [{2}, {0}, {1, 4}])
@pytest.mark.parametrize(("failure", "num_trials"), [("", MAX_VANISHED_TRIALS), ("step 3: boom", MAX_FAILED_TRIALS)])
def test_poisonous_sequences_end_after_their_trials_and_the_innocent_finish(
    poison: set[int], depth: int, failure: str, num_trials: int
) -> None:
    engine = make_engine(max_plans_in_flight=depth)
    requests = create_requests(6, max_tokens=12)
    engine.add(*requests)
    unproven_at_losses = run_with_poison(engine, poison, failure)
    failed = {s: finished for s, finished in engine.finished.items() if finished.reason is FinishReason.ERROR}
    assert failed.keys() == poison
    assert all(failure in (finished.error or "") for finished in failed.values())
    assert len(unproven_at_losses) == 2 + num_trials * len(poison)
    assert all(len(unproven) == 1 for unproven in unproven_at_losses[2:]), "a suspect is beside one that is not proven"
    innocent = [request for request in requests if request.sequence_id not in poison]
    assert {s: tokens for s, tokens in engine.outputs.items() if s not in poison} == expected(innocent)


def test_one_poisonous_sequence_among_64_others_ends_alone() -> None:
    engine = make_engine()
    requests = create_requests(65, max_tokens=30)
    engine.add(*requests)
    num_losses = len(run_with_poison(engine, {64}, "boom"))
    assert num_losses == 2 + MAX_FAILED_TRIALS
    assert [s for s, finished in engine.finished.items() if finished.reason is FinishReason.ERROR] == [64]
    assert {s: tokens for s, tokens in engine.outputs.items() if s != 64} == expected(requests[:64])


def test_a_session_without_a_result_accuses_nobody() -> None:
    """A worker that dies at whatever it is given first: losses count only once the session has shown that it works."""
    engine = make_engine()
    requests = create_requests(3, max_tokens=6)
    engine.add(*requests)
    for _ in range(20):
        assert engine.launch() is not None
        engine.lose_worker("every step fails")
        engine.attach_worker(FakeRunner())
    assert not engine.finished
    engine.drain()
    assert {s: engine.outputs[s] for s in range(3)} == expected(requests)


def test_suspects_wait_for_a_probe_and_its_token_is_nobodys() -> None:
    engine = make_engine()
    requests = create_requests(2, max_tokens=6)
    engine.add(*requests)
    for _ in range(2):
        engine.launch()
        engine.lose_worker()
        engine.attach_worker(FakeRunner())
    plan = launch(engine)
    assert added_ids(plan) == [PROBE_ID]
    assert engine.launch() is None, "a suspect enters before the probe's result"
    outputs = engine.deliver()
    assert not outputs.sequence_ids and not outputs.finished
    assert added_ids(launch(engine)) == [0]
    engine.drain()
    assert {s: engine.outputs[s] for s in range(2)} == expected(requests)
    engine.scheduler.check_integrity()


def test_random_kills_accuse_nobody() -> None:
    """60 kills from outside under 16 long streams, near a hundred steps apart or, as often, within the first steps of
    the next session, so that many hit a trial.
    """
    rng = np.random.default_rng(0)
    worker = worker_info(num_blocks=60_000, max_model_len=30_000)
    scheduler = make_engine(worker).scheduler
    for request in create_requests(16, prompt_len=40, max_tokens=25_000):
        scheduler.add(request)
    num_kills = num_tried = steps_left = 0
    while num_kills < 60:
        while scheduler.schedule() is not None:
            pass
        steps_left -= 1
        if steps_left < 0:
            steps_left = int(rng.integers(0, 12)) if rng.random() < 0.5 else int(rng.exponential(100))
            num_kills += 1
            assert scheduler.lose_worker() == []
            num_tried += any(sequence.num_trial_losses for sequence in scheduler._live.values())
            scheduler.attach_worker(worker)
        else:
            step = scheduler._in_flight.oldest
            num_rows = len(step.rows)
            assert scheduler.update(StepResult(step.step_id, [1] * num_rows, [7] * num_rows)).finished == []
    assert num_tried, "no kill hit a trial: the test shows nothing"
    scheduler.check_integrity()


def test_losses_with_progress_between_them_end_nobody() -> None:
    engine = make_engine()
    requests = create_requests(4, max_tokens=60)
    engine.add(*requests)
    for _ in range(6):
        for _ in range(8):
            engine.step()
        engine.lose_worker()
        engine.attach_worker(FakeRunner())
    engine.drain()
    assert engine.outputs == expected(requests)


def test_nothing_keeps_a_scheduler_from_being_used_again() -> None:
    """run() twice on one scheduler: rows, ids and the cache carry over."""
    engine = make_engine(worker_info(num_blocks=12), max_num_seqs=4)
    requests = create_requests(10, prompt_len=40, max_tokens=30, common_prefix=range(16))
    for _ in range(2):
        assert run(engine.scheduler, engine.runner, requests) == expected(requests)
    engine.scheduler.check_integrity()
    assert engine.scheduler.load().num_used_blocks == 0


def test_what_waits_is_bounded_in_tokens_too() -> None:
    engine = make_engine(max_num_seqs=1, max_num_waiting_tokens=100)
    engine.add(create_request(A, range(60)), create_request(B, range(40)))
    with pytest.raises(QueueFull, match="100 prompt tokens"):
        engine.add(create_request(C, range(1)))
    launch(engine)
    engine.add(create_request(C, range(60)))
    with pytest.raises(QueueFull):
        engine.add(create_request(NEW, range(1)))
    assert engine.scheduler.abort(C)
    engine.add(create_request(NEW, range(60)))
    engine.drain()
    engine.scheduler.check_integrity()


def test_one_sequence_may_wait_however_long_it_is() -> None:
    engine = make_engine(max_num_waiting_tokens=10)
    engine.add(create_request(A, range(50)))
    engine.drain()


def test_a_report_on_a_row_with_a_fault_is_dropped() -> None:
    engine = make_engine()
    engine.add(create_request(A, sampling=RowSampling(num_logprobs=2)), create_request(B))
    engine.runner.faulty.add(A)  # type: ignore[attr-defined]
    launch(engine)
    outputs = engine.deliver()
    assert not outputs.logprobs and [finished.sequence_id for finished in outputs.finished] == [A]


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


def test_a_request_of_many_choices_is_taken_whole_or_not_at_all() -> None:
    """64 choices of a prompt that together pass the limit on tokens: taken where nothing waits, else told to wait."""
    engine = make_engine(max_num_seqs=1, max_num_waiting_tokens=1000)
    choices = [create_request(index, range(70)) for index in range(64)]
    engine.scheduler.add(*choices)
    assert engine.scheduler.load().num_waiting_sequences == 64
    with pytest.raises(QueueFull):
        engine.scheduler.add(create_request(A), create_request(B))
    for choice in choices:
        assert engine.scheduler.abort(choice.sequence_id)
    engine.scheduler.add(create_request(A), create_request(B))
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("ending", ["by length", "aborted"])
def test_a_suspect_is_not_tried_beside_a_step_of_another_that_is_still_in_flight(ending: str) -> None:
    """A poisonous sequence that drains, or is cancelled, after its only plan: the suspect is not to blame for that."""
    engine = make_engine()
    suspect = create_request(A, range(20), 30)
    engine.add(suspect)
    for _ in range(2):
        engine.launch()
        engine.lose_worker()
        engine.attach_worker(FakeRunner())
    launch(engine)
    engine.deliver()
    for number in range(MAX_FAILED_TRIALS + 1):
        poison = create_request(LATE + number, range(50, 60), 1 if ending == "by length" else 9, priority=-1)
        engine.add(poison)
        assert added_ids(launch(engine)) == [poison.sequence_id]
        if ending == "aborted":
            assert engine.scheduler.abort(poison.sequence_id)
        assert engine.launch() is None, "the suspect enters beside it"
        engine.lose_worker("the poison works")
        engine.attach_worker(FakeRunner())
        engine.scheduler.abort(poison.sequence_id)
        launch(engine)
        engine.deliver()
    assert A not in engine.finished
    engine.drain()
    assert engine.outputs[A] == expected_tokens(suspect)
