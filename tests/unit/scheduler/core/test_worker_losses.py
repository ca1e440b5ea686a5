"""A lost worker costs no token, and the next one may be another."""

import pytest

from tandem_scheduler.core.types import FinishReason
from tests.support.builders import create_request, create_requests, worker_info
from tests.support.fake_worker import FakeRunner, expected_tokens
from tests.unit.scheduler.core.engines import expected, launch, make_engine

A, LATE, LARGE, SMALL = range(100, 104)


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
