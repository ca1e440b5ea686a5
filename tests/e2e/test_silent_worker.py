"""A worker that goes silent while its connection stays open is noticed within a stated time, at default settings.

The time is a promise to users, not a measurement of speed, so here a test looks at the clock.
"""

from collections.abc import Callable, Iterator

import grpc
import pytest

from tandem.v1 import inference_pb2_grpc
from tests.e2e.conftest import VOCAB_SIZE, StartEngine
from tests.e2e.link import Link
from tests.e2e.services import INFERENCE, Engine, HealthWatch, Stream, generate_request, random_prompt
from tests.e2e.waiting import wait_until

NOTICED_WITHIN_S = 6.0
NUM_TOKENS = 900


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    link = Link()
    yield link
    link.close()


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, link: Link) -> Engine:
    return start_engine(link=link)


def freeze(engine: Engine, link: Link) -> Callable[[], None]:
    serving = engine.worker.serving()
    serving.suspend()
    return serving.resume


def silence(engine: Engine, link: Link) -> Callable[[], None]:
    link.fall_silent()
    return link.recover


@pytest.mark.parametrize(
    ("disturb", "is_busy"),
    [
        pytest.param(freeze, False, id="frozen-idle"),
        pytest.param(freeze, True, id="frozen-busy", marks=pytest.mark.slow),
        pytest.param(silence, False, id="silent-idle", marks=pytest.mark.slow),
        pytest.param(silence, True, id="silent-busy"),
    ],
)
def test_a_silent_worker_is_lost_within_6_seconds(
    engine: Engine, link: Link, disturb: Callable[[Engine, Link], Callable[[], None]], is_busy: bool
) -> None:
    losses = engine.load().num_worker_losses
    readiness = HealthWatch(engine, INFERENCE)
    readiness.wait_status("SERVING")
    request = generate_request(random_prompt(8, VOCAB_SIZE), NUM_TOKENS)
    streams = [engine.stream(request)] if is_busy else []
    for stream in streams:
        stream.wait_tokens(1)
    restore = disturb(engine, link)
    try:
        wait_until(lambda: readiness.statuses[-1] == "NOT_SERVING", "the loss is noticed", NOTICED_WITHIN_S)
        assert engine.load().num_worker_losses == losses + 1
    finally:
        restore()
    assert [len(stream.result()) for stream in streams] == [NUM_TOKENS] * is_busy
    readiness.wait_status("SERVING")
    readiness.close()


@pytest.mark.slow
def test_a_silent_client_is_given_up_and_its_blocks_are_free(engine: Engine) -> None:
    """Its connection stays open, and no ping of the server's is answered."""
    link = Link()
    request = generate_request(random_prompt(8, VOCAB_SIZE), NUM_TOKENS)
    try:
        with grpc.insecure_channel(link.listen(engine.scheduler.port)) as channel:
            stream = Stream(inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(request))
            stream.wait_tokens(1)
            link.fall_silent()
            # So that it is not at its end by then.
            others = [engine.stream(request) for _ in range(30)]
            wait_until(lambda: engine.load().num_running_sequences <= len(others), "it is given up", 30)
            assert all(len(other.result()) == NUM_TOKENS for other in others)
    finally:
        link.close()
