"""The simulation itself: its clock, its true answers, and that a world depends on its seed alone."""

import asyncio
import time

import pytest

from tandem_scheduler.engine import step_loop
from tests.chaos.simulation.part import simulate
from tests.chaos.simulation.truths import LENGTH, STOP, make_truth
from tests.chaos.simulation.virtual_time import NothingCanHappen, run_virtually
from tests.support.tokenizers import embedded


def test_hours_pass_at_once_and_in_order() -> None:
    async def sleep(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return step_loop.time.monotonic()

    async def main() -> list[float]:
        return [await each for each in asyncio.as_completed([sleep(7200), sleep(3600)])]

    began = time.monotonic()
    assert run_virtually(main()) == pytest.approx([3600, 7200])
    assert time.monotonic() - began < 5
    assert step_loop.time is time


def test_a_wait_for_nothing_is_seen() -> None:
    with pytest.raises(NothingCanHappen):
        run_virtually(asyncio.Event().wait())


def test_the_truth_ends_at_the_first_stop() -> None:
    tokenizer = embedded()
    ids = tokenizer.encode("Good morrow, cousin").ids

    def truth(**stops: object) -> tuple[int, str, tuple[int, str, int | None]]:
        made = make_truth(ids, tokenizer, skip_special_tokens=True, **stops)  # type: ignore[arg-type]
        return len(made.tokens), made.text, made.finish

    assert truth() == (len(ids), "Good morrow, cousin", (LENGTH, "", None))
    text = tokenizer.decode(ids[:3])
    assert truth(stop_token_ids=[ids[3], ids[1]]) == (2, tokenizer.decode(ids[:1]), (STOP, "", ids[1]))
    assert truth(stop_strings=["cousin", text]) == (3, "", (STOP, text, None))
    # If two stop strings end together, the longer one is reported.
    assert truth(stop_strings=["sin", "cousin"]) == (len(ids), "Good morrow, ", (STOP, "cousin", None))
    included = truth(stop_strings=["cousin"], include_stop_string=True)
    assert included == (len(ids), "Good morrow, cousin", (STOP, "cousin", None))
    # A stop string that ends before min_tokens is text like any other.
    assert truth(stop_strings=[text], min_tokens=3) == truth()
    assert truth(stop_strings=[text], min_tokens=2) == truth(stop_strings=[text])


def test_a_seed_says_all() -> None:
    first, second = simulate(3), simulate(3)
    assert not first.failures
    assert first.num_steps >= 500
    assert (first.num_steps, first.seconds, first.events) == (second.num_steps, second.seconds, second.events)
