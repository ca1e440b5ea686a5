"""Real processes: several engines on a host, long prompts, clients that go away, an orderly stop."""

import signal
from pathlib import Path

import grpc
import pytest

from tests.e2e.conftest import VOCAB_SIZE, StartEngine
from tests.e2e.services import Engine, generate_request, random_prompt
from tests.e2e.waiting import WAIT_S, wait_until
from tests.support.model_factory import save_random_model

NUM_LONG_PROMPT_TOKENS = 40_000


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine) -> Engine:
    return start_engine()


@pytest.fixture(scope="module")
def long_context_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, for which the attention of 40,000 tokens takes only seconds."""
    return save_random_model(
        tmp_path_factory.mktemp("long"),
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=65_536,
    )


def blocks_of(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


@pytest.mark.slow
def test_two_engines_share_a_host(engine: Engine, start_engine: StartEngine) -> None:
    other = start_engine()
    ports = {service.port for each in (engine, other) for service in (each.worker, each.scheduler)}
    assert len(ports) == 4
    request = generate_request(random_prompt(9, VOCAB_SIZE), 60, temperature=0.7, seed=1)
    streams = [each.stream(request) for each in (engine, other)]
    first, second = (stream.result() for stream in streams)
    assert first == second
    assert len(first) == 60
    # The worker of the second engine dies, and the first engine doesn't notice.
    other.worker.kill()
    wait_until(lambda: other.load().num_worker_losses == 1, "the other engine's loss")
    assert engine.stream(request).result() == first
    assert engine.load().num_worker_losses == 0
    other.close()


@pytest.mark.slow
def test_a_prompt_of_40000_tokens_is_served(start_engine: StartEngine, long_context_folder: Path) -> None:
    engine = start_engine(
        long_context_folder, dtype="float32", worker_flags=["--num-blocks", "2600", "--max-num-batched-tokens", "1024"]
    )
    request = generate_request(random_prompt(NUM_LONG_PROMPT_TOKENS, VOCAB_SIZE), 3)
    stream = engine.stream(request)
    assert len(stream.result()) == 3
    assert stream.usage is not None
    assert stream.usage.num_prompt_tokens == NUM_LONG_PROMPT_TOKENS
    engine.close()


def test_a_cancelled_request_gives_its_blocks_back_while_others_run(engine: Engine) -> None:
    block_size = engine.load().block_size_tokens
    kept = engine.stream(generate_request(random_prompt(8, VOCAB_SIZE, seed=1), 900))
    cancelled = engine.stream(generate_request(random_prompt(900, VOCAB_SIZE, seed=2), 120))
    kept.wait_tokens(1)
    cancelled.wait_tokens(1)
    assert engine.load().num_used_blocks >= blocks_of(900, block_size)
    cancelled.call.cancel()
    cancelled.join()
    assert cancelled.error is not None
    assert cancelled.error.code() == grpc.StatusCode.CANCELLED
    wait_until(lambda: engine.load().num_running_sequences == 1, "the cancelled sequence is gone")
    num_tokens = len(kept.token_ids)
    load = engine.load()
    assert kept.is_running()
    assert load.num_running_sequences == 1
    assert load.num_used_blocks < blocks_of(8 + num_tokens, block_size) + blocks_of(900, block_size)
    assert len(kept.result()) == 900
    assert engine.load().num_used_blocks == 0


def test_a_request_past_its_deadline_gives_its_blocks_back(engine: Engine) -> None:
    late = engine.stream(generate_request(random_prompt(20, VOCAB_SIZE, seed=3), 1000), timeout_s=0.3)
    late.join()
    assert late.error is not None
    assert late.error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: engine.load().num_running_sequences == 0, "the late sequence is gone")
    load = engine.load()
    assert load.num_used_blocks == 0
    assert load.num_waiting_sequences == 0
    assert load.num_free_blocks + load.num_cached_blocks == load.num_total_blocks


def test_sigterm_finishes_what_runs_and_ends_with_status_0(engine: Engine) -> None:
    stream = engine.stream(generate_request(random_prompt(5, VOCAB_SIZE, seed=4), 300))
    stream.wait_tokens(1)
    engine.scheduler.signal(signal.SIGTERM)
    assert len(stream.result()) == 300
    assert engine.scheduler.process.wait(WAIT_S) == 0
    engine.worker.signal(signal.SIGTERM)
    assert engine.worker.process.wait(WAIT_S) == 0


@pytest.mark.parametrize(
    ("front_ends", "number"), [("0", signal.SIGINT), pytest.param("2", signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_second_signal_ends_the_drain_and_every_stream(
    start_engine: StartEngine, front_ends: str, number: signal.Signals
) -> None:
    engine = start_engine(scheduler_flags=["--drain-grace-s", "600", "--api-server-count", front_ends])
    stream = engine.stream(generate_request(random_prompt(5, VOCAB_SIZE, seed=4), 1000))
    stream.wait_tokens(1)
    engine.worker.serving().send_signal(signal.SIGSTOP)
    engine.scheduler.signal(number)
    wait_until(lambda: "stopping" in engine.scheduler.log_file.read_text(), "the drain")
    assert stream.is_running()
    engine.scheduler.signal(number)
    assert engine.scheduler.process.wait(20) == 0
    stream.join()
    assert stream.error is not None
    assert stream.error.code() == grpc.StatusCode.UNAVAILABLE
    assert stream.error.details() == "the server is stopping"
    engine.close()
