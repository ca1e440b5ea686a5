"""A worker dies or freezes, and every stream goes on to the tokens that it would have had.

The truth is what the same eight requests give on the same engine, undisturbed.
"""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tests.e2e.conftest import VOCAB_SIZE, StartEngine
from tests.e2e.services import (
    INFERENCE,
    Engine,
    HealthWatch,
    Service,
    Stream,
    generate_request,
    random_prompt,
    wait_ready,
)
from tests.e2e.waiting import wait_until

NUM_STREAMS = 8
NUM_TOKENS = 400
NUM_TOKENS_BEFORE = 20
STEP_TIMEOUT_S = 1.0


def make_requests() -> list[inference_pb2.GenerateStreamRequest]:
    """Eight requests of unequal length: half are greedy, half are sampled with a seed."""
    return [
        generate_request(
            random_prompt(5 + 9 * index, VOCAB_SIZE, seed=index),
            NUM_TOKENS + index,
            temperature=0.8 if index % 2 else 0.0,
            seed=100 + index,
        )
        for index in range(NUM_STREAMS)
    ]


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine) -> Engine:
    return start_engine(scheduler_flags=["--step-timeout-s", str(STEP_TIMEOUT_S)])


@pytest.fixture(scope="module")
def truth(engine: Engine) -> list[list[int]]:
    outputs = [stream.result() for stream in [engine.stream(request) for request in make_requests()]]
    assert [len(output) for output in outputs] == [NUM_TOKENS + index for index in range(NUM_STREAMS)]
    assert sum(len(set(output)) for output in outputs) / NUM_STREAMS >= 20
    return outputs


def wait_mid_way(streams: list[Stream], num_tokens: int) -> None:
    """Waits until every stream has num_tokens tokens, and checks that none has ended by then."""
    for stream in streams:
        stream.wait_tokens(num_tokens)
    assert all(len(stream.token_ids) < NUM_TOKENS and stream.is_running() for stream in streams)


def wait_loss(engine: Engine, count: int) -> None:
    wait_until(lambda: engine.load().num_worker_losses >= count, f"{count} worker losses")


def lose_worker(engine: Engine, streams: list[Stream], cause: Callable[[], object]) -> None:
    """Calls `cause` and waits until the scheduler has lost its worker. All streams stay open."""
    losses = engine.load().num_worker_losses
    cause()
    wait_loss(engine, losses + 1)
    assert all(stream.is_running() for stream in streams)


def kill_and_replace(engine: Engine, streams: list[Stream]) -> None:
    lose_worker(engine, streams, engine.worker.kill)
    engine.restart_worker()


def kill_twice(engine: Engine, streams: list[Stream]) -> None:
    kill_and_replace(engine, streams)
    # After a loss the requests that may have caused it run one after another: any token shows that the engine works.
    counts = [len(stream.token_ids) for stream in streams]
    wait_until(
        lambda: any(len(stream.token_ids) > count for stream, count in zip(streams, counts, strict=True)), "a token"
    )
    assert any(stream.is_running() for stream in streams)
    kill_and_replace(engine, streams)


def kill_and_wait(engine: Engine, streams: list[Stream]) -> None:
    """Only the supervisor starts another worker."""
    lose_worker(engine, streams, engine.worker.serving().kill)


def freeze_and_thaw(engine: Engine, streams: list[Stream]) -> None:
    worker = engine.worker.serving()
    lose_worker(engine, streams, worker.suspend)
    worker.resume()


def freeze_for_good(engine: Engine, streams: list[Stream]) -> None:
    """Only the supervisor ends the frozen worker."""
    lose_worker(engine, streams, engine.worker.serving().suspend)


def freeze_and_replace(engine: Engine, streams: list[Stream]) -> None:
    lose_worker(engine, streams, engine.worker.serving().suspend)
    engine.worker.kill()
    engine.restart_worker()


Disturbance = Callable[[Engine, list[Stream]], None]


@pytest.mark.parametrize(
    ("disturb", "num_losses"),
    [
        pytest.param(kill_and_replace, 1, id="killed"),
        pytest.param(kill_twice, 2, id="killed-twice", marks=pytest.mark.slow),
        pytest.param(kill_and_wait, 1, id="killed-under-its-supervisor", marks=pytest.mark.slow),
        pytest.param(freeze_and_thaw, 1, id="frozen", marks=pytest.mark.slow),
        pytest.param(freeze_and_replace, 1, id="frozen-then-killed", marks=pytest.mark.slow),
        pytest.param(freeze_for_good, 1, id="frozen-under-its-supervisor", marks=pytest.mark.slow),
    ],
)
def test_every_stream_ends_with_the_tokens_of_an_undisturbed_run(
    engine: Engine, truth: list[list[int]], disturb: Disturbance, num_losses: int
) -> None:
    losses = engine.load().num_worker_losses
    readiness, liveness = HealthWatch(engine, INFERENCE), HealthWatch(engine, "")
    streams = [engine.stream(request) for request in make_requests()]
    wait_mid_way(streams, NUM_TOKENS_BEFORE)
    disturb(engine, streams)
    assert [stream.result() for stream in streams] == truth
    readiness.wait_status("SERVING")
    assert readiness.statuses == ["SERVING", *["NOT_SERVING", "SERVING"] * num_losses]
    assert liveness.statuses == ["SERVING"]
    assert engine.load().num_worker_losses == losses + num_losses
    assert engine.load().num_used_blocks == 0
    readiness.close()
    liveness.close()


def test_new_requests_queue_while_the_worker_is_away(engine: Engine, truth: list[list[int]]) -> None:
    losses = engine.load().num_worker_losses
    engine.worker.kill()
    wait_loss(engine, losses + 1)
    streams = [engine.stream(request) for request in make_requests()]
    wait_until(lambda: engine.load().num_waiting_sequences == NUM_STREAMS, "eight waiting sequences")
    engine.restart_worker()
    assert [stream.result() for stream in streams] == truth


def test_a_step_that_fails_ends_the_worker_which_says_why_and_is_started_again(
    model_folder: Path, tmp_path: Path, truth: list[list[int]]
) -> None:
    """The scheduler and both logs name the reason, the exit status is 70, the supervisor starts another worker, and the
    streams go on.
    """
    flags = ["--model", str(model_folder), "--device", "cpu", "--dtype", "float64", "--num-threads", "1"]
    worker = Service("tests.e2e.failing_worker", flags, tmp_path, before=[str(tmp_path / "marker")])
    scheduler = None
    try:
        worker.wait_listening()
        address = ["--worker-address", worker.address]
        scheduler = Service("tandem_scheduler", [*flags[:2], "--tokenizer", "embedded", *address], tmp_path)
        scheduler.wait_listening()
        with grpc.insecure_channel(scheduler.address, CHANNEL_OPTIONS) as channel:
            wait_ready(channel)
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            streams = [Stream(stub.GenerateStream(request)) for request in make_requests()]
            assert [stream.result() for stream in streams] == truth
        reason = "step 30 failed: RuntimeError('this step was to fail')"
        assert f"worker lost: it said: {reason}" in scheduler.log_file.read_text()
        before, after = worker.log_file.read_text().split("the worker ended with status 70; starting it again", 1)
        # The supervisor's own line follows the worker's last one.
        assert before.splitlines()[-2].endswith(f"the worker ends: {reason}")
        assert "step 30 failed" not in after
    finally:
        worker.kill()
        if scheduler is not None:
            scheduler.kill()
