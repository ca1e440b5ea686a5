"""The arithmetic of the harness's overload parts."""

import json

import pytest

from tests.chaos.admission.part import read_recording
from tests.chaos.overload.fairness import fairness, jain_index
from tests.chaos.overload.part import what_is_full


def test_jain_index() -> None:
    assert jain_index([7, 7, 7]) == pytest.approx(1)
    assert jain_index([1, 0, 0, 0]) == pytest.approx(1 / 4)
    assert jain_index([1, 2, 3]) == pytest.approx(36 / 42)


def test_fairness_is_of_the_window_in_which_all_run() -> None:
    early = [(0.0, 1), (1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)]
    # Two tokens in a message, and a gap of two seconds.
    late = [(1.5, 1), (2.5, 1), (4.5, 2), (9.0, 1)]
    found = fairness([early, late])
    assert found.window_s == 2.5
    assert (found.median_gap_s, found.longest_gap_s) == (1.0, 1.0)
    # Messages after 1.5 and until 4: those at 2, 3 and 4 of one stream, and that at 2.5 of the other.
    assert found.jain == pytest.approx(16 / (2 * 10))
    assert found.tokens_per_message == 1.0


def test_gaps_within_the_window_are_seen() -> None:
    steady = [(float(at), 1) for at in range(10)]
    paused = [(0.0, 1), (1.0, 1), (7.0, 6), (8.0, 1), (9.0, 1)]
    found = fairness([steady, paused])
    assert (found.median_gap_s, found.longest_gap_s) == (1.0, 6.0)
    assert found.jain == pytest.approx(1)


def test_streams_that_never_run_at_once_have_no_fairness() -> None:
    with pytest.raises(ValueError, match="at once"):
        fairness([[(0.0, 1), (1.0, 1)], [(2.0, 1), (3.0, 1)]])


def test_a_recording_shows_what_started_late() -> None:
    def schedule(*sequence_ids: int) -> dict[str, object]:
        added = [{"sequence_id": sequence_id} for sequence_id in sequence_ids]
        return {"call": "schedule", "arguments": [None], "answer": {"added_rows": added}}

    def expire(now: float, *ended: int) -> dict[str, object]:
        return {"call": "expire", "arguments": [now], "answer": list(ended)}

    requests = [{"sequence_id": number, "deadline": float(number)} for number in range(5)]
    calls: list[dict[str, object]] = [
        {"format": "tandem-schedule"},
        {"call": "add", "arguments": requests, "answer": None},
        {"call": "add", "arguments": [{"sequence_id": 9, "deadline": None}], "error": "QueueFull"},
        expire(1.0, 0),
        # Sequence 1 is late, if by 0 s.
        schedule(1, 2),
        {"call": "schedule", "arguments": [None], "answer": None},
        # The scheduler was told no time before this plan.
        schedule(3),
        expire(2.5),
        schedule(4),
    ]
    recorded = read_recording(map(json.dumps, calls))
    assert vars(recorded) == {
        "num_without_deadline": 1,
        "num_expired": 1,
        "num_started": 4,
        "num_started_late": 2,
    }


@pytest.mark.parametrize(
    ("refusal", "what"),
    [
        ("QueueFull: 64 sequences are waiting", "sequences"),
        ("QueueFull: 6400 prompt tokens are waiting", "tokens"),
        ("QueueFull: 8 calls of this connection are open, 16 in all", "calls"),
        ("QueueFull: the moon", "something else"),
    ],
)
def test_what_a_refusal_says_is_full(refusal: str, what: str) -> None:
    assert what_is_full(refusal) == what
