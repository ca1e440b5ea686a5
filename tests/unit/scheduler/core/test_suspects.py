"""Poisonous sequences are found, and nobody else is accused. Their rules are in core/suspects.py."""

import numpy as np
import pytest

from tandem_scheduler.core.suspects import MAX_FAILED_TRIALS, MAX_VANISHED_TRIALS, PROBE_ID
from tandem_scheduler.core.types import FinishReason
from tandem_shared.step_plan import StepResult
from tests.support.builders import create_request, create_requests, worker_info
from tests.support.engine import Engine
from tests.support.fake_worker import FakeRunner, expected_tokens
from tests.unit.scheduler.core.engines import added_ids, expected, launch, make_engine

A, LATE = range(100, 102)


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
    """A worker dies at the first step that it is given. Losses count only once a session has shown that it works."""
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


@pytest.mark.parametrize("ending", ["by length", "aborted"])
def test_a_suspect_is_not_tried_beside_a_step_of_another_that_is_still_in_flight(ending: str) -> None:
    """A poisonous sequence drains, or is cancelled, after its only plan. The suspect beside it is not to blame."""
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
