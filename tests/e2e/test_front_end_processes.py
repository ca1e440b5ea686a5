"""Front ends as processes beside real services: killing one process disturbs only that process's own calls."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import grpc
import psutil
import pytest

from tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem_scheduler.processes.engine_side.front_end_pool import MODULE
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tests.e2e.conftest import VOCAB_SIZE, StartEngine
from tests.e2e.services import Engine, Stream, generate_request, random_prompt
from tests.e2e.waiting import WAIT_S, wait_until

NUM_STREAMS = 8
NUM_TOKENS = 200


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine) -> Engine:
    return start_engine(scheduler_flags=["--api-server-count", "2"])


def make_requests() -> list[inference_pb2.GenerateStreamRequest]:
    return [
        generate_request(
            random_prompt(5 + 9 * index, VOCAB_SIZE, seed=index), NUM_TOKENS, temperature=0.8 * (index % 2), seed=index
        )
        for index in range(NUM_STREAMS)
    ]


def front_ends(engine: Engine) -> list[psutil.Process]:
    children = psutil.Process(engine.scheduler.process.pid).children()
    return [child for child in children if MODULE in child.cmdline()]


@contextmanager
def streams_of(engine: Engine) -> Iterator[list[Stream]]:
    """Sends each request on a connection of its own, so that both front ends have some of them."""
    port = engine.scheduler.port
    with ExitStack() as stack:
        while True:
            channels = [
                stack.enter_context(
                    grpc.insecure_channel(
                        engine.scheduler.address, [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
                    )
                )
                for _ in range(NUM_STREAMS)
            ]
            for channel in channels:
                grpc.channel_ready_future(channel).result(WAIT_S)
            own = [
                sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in child.net_connections("tcp"))
                for child in front_ends(engine)
            ]
            # One of a front end's connections may be the engine's own channel.
            if min(own) >= 2:
                break
        yield [
            Stream(inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(request, timeout=WAIT_S))
            for channel, request in zip(channels, make_requests(), strict=True)
        ]


def test_a_killed_worker_disturbs_no_stream_of_any_front_end(engine: Engine) -> None:
    with streams_of(engine) as streams:
        truth = [stream.result() for stream in streams]
    with streams_of(engine) as streams:
        for stream in streams:
            stream.wait_tokens(10)
        assert all(stream.is_running() for stream in streams)
        engine.worker.kill()
        wait_until(lambda: engine.load().num_worker_losses == 1, "the loss")
        assert all(stream.is_running() for stream in streams)
        engine.restart_worker()
        assert [stream.result() for stream in streams] == truth
    assert engine.load().num_used_blocks == 0
