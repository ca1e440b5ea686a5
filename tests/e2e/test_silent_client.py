"""A server gives up a client that goes silent while its connection stays open. For silent services see tests/chaos."""

import grpc
import pytest

from tandem.v1 import inference_pb2_grpc
from tests.e2e.conftest import VOCAB_SIZE, StartEngine
from tests.e2e.link import Link
from tests.e2e.services import Stream, generate_request, random_prompt
from tests.e2e.waiting import wait_until

NUM_TOKENS = 900


@pytest.mark.slow
def test_a_silent_client_is_given_up_and_its_blocks_are_free(start_engine: StartEngine) -> None:
    """The client's connection stays open, and the server's pings get no answer."""
    engine, link = start_engine(), Link()
    request = generate_request(random_prompt(8, VOCAB_SIZE), NUM_TOKENS)
    try:
        with grpc.insecure_channel(link.listen(engine.scheduler.port)) as channel:
            stream = Stream(inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(request))
            stream.wait_tokens(1)
            link.fall_silent()
            # Other streams slow the client's down, so that it does not end before the server notices.
            others = [engine.stream(request) for _ in range(30)]
            wait_until(lambda: engine.load().num_running_sequences <= len(others), "it is given up", 30)
            assert all(len(other.result()) == NUM_TOKENS for other in others)
    finally:
        link.close()
