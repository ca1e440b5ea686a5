"""The arithmetic of the kills: how long after one the next token came."""

import pytest

from tests.chaos.kills import next_token_at, waits

ARRIVALS = [0.1, 0.2, 0.3, 0.4, 0.45, 5.0, 5.1, 5.2, 9.0, 9.1]


def test_tokens_that_were_under_way_at_the_kill_are_not_the_next() -> None:
    assert next_token_at(0.35, ARRIVALS, 1.0) == 5.0
    assert next_token_at(0.45, ARRIVALS, 1.0) == 5.0


def test_a_kill_of_a_worker_that_starts_is_counted_from_the_kill() -> None:
    assert next_token_at(3.0, ARRIVALS, 1.0) == 5.0


def test_there_may_be_no_next_token_yet() -> None:
    assert next_token_at(9.05, ARRIVALS, 1.0) is None
    assert next_token_at(10.0, ARRIVALS, 1.0) is None


def test_kills_that_another_loss_overtakes_are_counted_apart() -> None:
    kills = [0.35, 2.0, 5.15]
    assert waits(kills, kills, ARRIVALS, 1.0) == (pytest.approx([3.0, 3.85]), 1)
    # A poisonous request took the worker down at 6.
    assert waits(kills, [*kills, 6.0], ARRIVALS, 1.0) == (pytest.approx([3.0]), 2)


def test_a_kill_after_which_no_token_came_is_in_neither() -> None:
    assert waits([9.05], [9.05], ARRIVALS, 1.0) == ([], 0)
