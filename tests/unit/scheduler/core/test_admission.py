"""Which sequences are accepted, wait, are admitted and are preempted, and in which order."""

from collections import Counter
from itertools import product

import pytest

from tandem_scheduler.core.types import FinishReason, SchedulerConfig, SequenceRequest
from tandem_shared.errors import ConfigError, InvalidRequest, QueueFull, RequestIdInUse
from tests.support.builders import create_request, create_requests, worker_info
from tests.support.fake_worker import expected_tokens
from tests.unit.scheduler.core.engines import added_ids, expected, launch, make_engine

A, B, C, FIRST, SECOND, THIRD, LATE, LOW, OLD, NEW, MORE = range(100, 111)


def test_a_live_id_is_refused() -> None:
    engine = make_engine()
    engine.add(create_request())
    with pytest.raises(RequestIdInUse):
        engine.scheduler.add(create_request(prompt=[5]))
    engine.drain()
    assert engine.outputs[0] == expected_tokens(create_request())


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
    """NEW shares its prompt's blocks with OLD, and its own blocks are cached, so it would fit again at once."""
    engine = make_engine(worker_info(block_size=4, num_blocks=6), admission_watermark=0.0, max_plans_in_flight=1)
    old, new = create_request(OLD, range(8), 12), create_request(NEW, range(8), 12, deadline=deadline)
    engine.add(old, new)
    plan = launch(engine)
    assert added_ids(plan) == [OLD, NEW]
    while not engine.scheduler.load().num_preemptions:
        engine.deliver()
        # The deadline, if there is one, has passed here, and the end of the call is still under way.
        assert engine.scheduler.expire(3.0) == []
        plan = launch(engine)
    assert added_ids(plan) == []
    is_late = deadline is not None
    assert [end.sequence_id for end in engine.scheduler.expire(3.0)] == ([NEW] if is_late else [])
    engine.drain()
    assert engine.outputs[OLD] == expected_tokens(old)
    assert is_late or engine.outputs[NEW] == expected_tokens(new)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("max_plans_in_flight", [1, 2, 4])
def test_sequences_that_preempt_each_other_all_end(max_plans_in_flight: int, enable_prefix_caching: bool) -> None:
    """In pools that hold one whole sequence and little more, a plan that preempts still computes something. drain()
    raises if nothing is planned while nothing is in flight.
    """
    num_preemptions = 0
    for block_size, prompt_len, max_tokens, num_spare_blocks, budget in product(
        (1, 2, 3), (1, 4), (2, 7), (0, 1, 3), (3, 16)
    ):
        num_needed = -(-(prompt_len + max_tokens - 1) // block_size)
        engine = make_engine(
            worker_info(block_size=block_size, num_blocks=1 + num_needed + num_spare_blocks),
            max_num_seqs=3,
            max_num_batched_tokens=budget,
            max_plans_in_flight=max_plans_in_flight,
            enable_prefix_caching=enable_prefix_caching,
        )
        # The first two have the same tokens.
        requests = [
            create_request(name, range(start, start + prompt_len), max_tokens)
            for name, start in ((A, 0), (B, 0), (C, 1))
        ]
        engine.add(*requests)
        engine.drain(max_steps=1000)
        assert engine.outputs == expected(requests)
        engine.scheduler.check_integrity()
        num_preemptions += engine.scheduler.load().num_preemptions
    assert num_preemptions > 20


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


def test_a_request_of_many_choices_is_taken_whole_or_not_at_all() -> None:
    """64 choices of a prompt together exceed the limit on tokens. They are accepted if nothing waits, else refused for
    now.
    """
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
