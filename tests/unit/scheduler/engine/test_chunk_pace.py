"""The limit on a step's prompt tokens follows the worker's measured speed."""

from tandem_scheduler.engine.chunk_pace import FIRST_TOKENS_ON_CPU, MIN_TOKENS, TARGET_STEP_S, ChunkPace


def limits(pace: ChunkPace, tokens_per_s: float, num_steps: int) -> list[int]:
    """The limits of steps that each compute as many tokens of an endless prompt as they may."""
    found = []
    for _ in range(num_steps):
        found.append(pace.limit)
        pace.note(pace.limit, pace.limit / tokens_per_s)
    return found


def test_a_gpu_keeps_its_whole_budget() -> None:
    assert limits(ChunkPace(8192, "NVIDIA H100"), tokens_per_s=40_000, num_steps=20) == [8192] * 20


def test_a_slow_cpu_comes_down_to_steps_of_about_a_second() -> None:
    """As with the 0.6B model on two cores: a prompt of 4,500 tokens, at some 30 tokens a second."""
    found = limits(ChunkPace(8192, "cpu"), tokens_per_s=30, num_steps=10)
    assert found[0] == FIRST_TOKENS_ON_CPU
    assert all(limit / 30 <= TARGET_STEP_S for limit in found[1:])
    assert found[-1] == 30


def test_a_fast_cpu_comes_up_to_the_budget() -> None:
    found = limits(ChunkPace(8192, "cpu"), tokens_per_s=100_000, num_steps=10)
    assert found == sorted(found) and found[-1] == 8192


def test_small_steps_and_decoding_alone_say_nothing() -> None:
    pace = ChunkPace(8192, "cpu")
    for _ in range(100):
        pace.note(0, 5.0)
        pace.note(10, 0.001)
    assert pace.limit == FIRST_TOKENS_ON_CPU


def test_decoding_rows_time_is_not_the_prompts() -> None:
    """On a CPU where decoding alone takes longer than the target, the limit for prompts still grows."""
    pace = ChunkPace(8192, "cpu")
    for _ in range(50):
        pace.note(0, 1.5)
        pace.note(pace.limit, 1.5 + pace.limit / 1000)
    assert 500 <= pace.limit <= 1000


def test_there_is_always_something_to_do() -> None:
    pace = ChunkPace(8192, "cpu")
    pace.note(200, 1e6)
    assert pace.limit == MIN_TOKENS
    assert ChunkPace(8, "cpu").limit == 8
