"""Log-probabilities of prompt tokens: the whole prompt is computed for them, and each position comes out once."""

from dataclasses import replace

import numpy as np
import pytest

from tandem_scheduler.core.types import SequenceRequest
from tandem_shared.errors import ProtocolError
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import PromptLogprobs, StepResult, WorkerInfo
from tests.support.builders import create_request, plain, prompt_logprobs, worker_info
from tests.support.engine import Engine
from tests.support.fake_worker import FakeRunner, expected_prompt_logprobs, expected_tokens
from tests.unit.scheduler.core.engines import launch, make_engine

A, B = 100, 101
SAMPLING = RowSampling(temperature=0.0, num_prompt_logprobs=2)
SMALL_BLOCKS = worker_info(block_size=4)


def asking(length: int, sequence_id: int = A, max_tokens: int = 8) -> SequenceRequest:
    return create_request(sequence_id, range(length), max_tokens, sampling=SAMPLING)


def joined(reports: list[PromptLogprobs]) -> PromptLogprobs:
    """The reports as one, if they follow each other."""
    whole = reports[0]
    for each in reports[1:]:
        assert each.first_position == whole.first_position + len(whole.logprobs)
        whole = replace(
            whole,
            logprobs=np.append(whole.logprobs, each.logprobs),
            ranks=np.append(whole.ranks, each.ranks),
            top_token_ids=np.append(whole.top_token_ids, each.top_token_ids),
            top_logprobs=np.append(whole.top_logprobs, each.top_logprobs),
        )
    return replace(whole, row=0)


@pytest.mark.parametrize("max_chunk_tokens", [None, 1, 4, 7])
def test_each_position_is_reported_once_whatever_the_chunks(max_chunk_tokens: int | None) -> None:
    engine = make_engine(SMALL_BLOCKS, max_chunk_tokens=max_chunk_tokens)
    request = asking(23)
    engine.add(request, create_request(B, range(30)))
    engine.drain()
    assert plain(joined(engine.prompt_reports[A])) == plain(expected_prompt_logprobs(request))
    assert engine.prompt_reports[B] == []
    assert engine.outputs[A] == expected_tokens(request)


def test_a_prompt_of_one_token_has_nothing_to_report() -> None:
    engine = make_engine()
    engine.add(asking(1))
    assert launch(engine).added_rows[0].sampling.num_prompt_logprobs is None
    engine.drain()
    assert engine.prompt_reports[A] == []


def test_cached_tokens_are_computed_again_and_what_is_computed_is_cached() -> None:
    engine = make_engine(SMALL_BLOCKS)
    engine.add(create_request(B, range(16)))
    engine.drain()
    engine.add(asking(20))
    assert launch(engine).added_rows[0].num_cached_tokens == 0
    engine.drain()
    assert engine.finished[A].num_cached_tokens == 0
    assert plain(joined(engine.prompt_reports[A])) == plain(expected_prompt_logprobs(asking(20)))
    engine.add(create_request(B, range(20)))
    assert launch(engine).added_rows[0].num_cached_tokens == 20
    engine.scheduler.check_integrity()


def lose(engine: Engine, worker: WorkerInfo) -> None:
    engine.lose_worker()
    engine.attach_worker(FakeRunner(worker))


def test_after_a_loss_only_what_was_not_reported_comes_out() -> None:
    engine = make_engine(SMALL_BLOCKS, max_chunk_tokens=5, max_plans_in_flight=1)
    request = asking(20)
    engine.add(request)
    for _ in range(2):
        launch(engine)
        engine.deliver()
    assert sum(len(report.logprobs) for report in engine.prompt_reports[A]) == 10
    # The new worker computes in chunks that end elsewhere.
    lose(engine, worker_info(block_size=4, max_num_batched_tokens=3))
    assert launch(engine).added_rows[0].sampling.num_prompt_logprobs == 2
    engine.drain()
    assert plain(joined(engine.prompt_reports[A])) == plain(expected_prompt_logprobs(request))
    assert engine.outputs[A] == expected_tokens(request)


def test_a_prompt_that_is_reported_is_not_asked_for_again_and_may_be_cached() -> None:
    engine = make_engine(SMALL_BLOCKS)
    engine.add(asking(20, max_tokens=30))
    for _ in range(4):
        launch(engine)
        engine.deliver()
    num_reported = len(engine.prompt_reports[A])
    engine.lose_worker()
    engine.attach_worker(FakeRunner(SMALL_BLOCKS))
    engine.add(create_request(B, range(20), priority=-1))
    rows = {row.sequence_id: row for row in launch(engine).added_rows}
    assert rows[A].sampling == replace(SAMPLING, num_prompt_logprobs=None)
    assert rows[A].num_cached_tokens == 20
    engine.drain()
    assert len(engine.prompt_reports[A]) == num_reported
    assert engine.outputs[A] == expected_tokens(asking(20, max_tokens=30))


def test_reports_of_a_sequence_that_has_ended_are_dropped() -> None:
    engine = make_engine()
    engine.add(asking(10))
    launch(engine)
    engine.scheduler.abort(A)
    assert engine.deliver().prompt_logprobs == []


REPORT = prompt_logprobs(0, 1, (-1.0, -2.0), (1, 2))


@pytest.mark.parametrize(
    "reports",
    [
        (),
        (replace(REPORT, row=1),),
        (replace(REPORT, first_position=2),),
        (prompt_logprobs(0, 1, (-1.0,), (1,)),),
        (prompt_logprobs(0, 1, (-1.0,) * 3, (1,) * 3),),
        (REPORT, REPORT),
        (prompt_logprobs(0, 1, (-1.0, -2.0), (1,)),),
        (replace(REPORT, num_top=1),),
        (prompt_logprobs(0, 1, (), ()), REPORT),
    ],
    ids=["none", "other row", "late", "short", "long", "twice", "ranks", "top", "empty"],
)
def test_reports_that_do_not_fit_their_plan_are_refused_whole(reports: tuple[PromptLogprobs, ...]) -> None:
    engine = make_engine()
    engine.add(asking(3))
    launch(engine)
    with pytest.raises(ProtocolError):
        engine.scheduler.update(StepResult(1, [1], [5], prompt_logprobs=reports))
    engine.drain()
    assert plain(joined(engine.prompt_reports[A])) == plain(expected_prompt_logprobs(asking(3)))
