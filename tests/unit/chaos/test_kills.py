"""The arithmetic of the kills: the time from a kill to the next token, and which findings meet the promises."""

from typing import Any

import pytest

from tests.chaos.kills.rows import rows
from tests.chaos.kills.waits import next_token_at, waits

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


POISON = {"kind": "fails", "num_outputs": 3, "losses": 4, "code": "INTERNAL"}
POISON["details"] = "the worker was lost 2 times while it computed this sequence apart from unproven others"
FOUND = {
    "streams": 2,
    "kinds": ["greedy", "chat"],
    "answers": 5,
    "tokens": 500,
    "longest_gap_s": 4.0,
    "ended": {},
    "wrong": 0,
    "faults": [],
    "kills": {"process": 2, "supervisor": 1},
    "start_s": [2.0],
    "wait_s": [3.0, 5.0],
    "overtaken": 1,
    "poisons": [POISON],
    "lost_sessions": 2,
    "left": {"used blocks": 0},
}


def test_good_findings_meet_the_promises() -> None:
    kills, time, poison = rows([FOUND, {**FOUND, "poisons": []}])
    assert kills.is_met and time.is_met and poison.is_met
    assert "6 kills" in kills.tried and "10 answers" in kills.tried
    assert "p50 4.0 s" in time.found and "2 that another loss" in time.tried
    assert "(greedy, chat; float64)" in kills.tried
    assert "5 answers" in poison.tried and "1 ended INTERNAL" in poison.found


@pytest.mark.parametrize(
    ("found", "met"),
    [
        ({"answers": 1}, (False, True, False)),
        ({"ended": {"UNAVAILABLE": 1}}, (False, True, False)),
        ({"wrong": 1}, (False, True, False)),
        ({"faults": ["a fault"]}, (False, True, False)),
        ({"left": {"used blocks": 1}}, (False, True, False)),
        ({"lost_sessions": 0}, (False, True, True)),
        ({"lost_sessions": 4}, (False, True, True)),
        ({"overtaken": 0}, (True, False, True)),
        ({"wait_s": [], "overtaken": 3}, (True, False, True)),
        ({"wait_s": [7.5, 7.5]}, (True, False, True)),
        ({"poisons": [{**POISON, "losses": 5}]}, (True, True, False)),
        ({"poisons": [{**POISON, "code": "OK"}]}, (True, True, False)),
        ({"poisons": [{**POISON, "details": "something else"}]}, (True, True, False)),
    ],
)
def test_bad_findings_do_not(found: dict[str, Any], met: tuple[bool, ...]) -> None:
    assert tuple(row.is_met for row in rows([{**FOUND, **found}])) == met
