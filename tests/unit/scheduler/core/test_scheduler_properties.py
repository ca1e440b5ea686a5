"""Random events against the scheduler core reach all that can go wrong, and break nothing."""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    run_state_machine_as_test,
)

from tests.unit.scheduler.core.scheduler_machine import SchedulerMachine

EVENTS = (
    "aborts",
    "expired",
    "faults of requests",
    "full hits",
    "late stops",
    "losses",
    "other workers",
    "outgrown",
    "overshoots",
    "poisonous",
    "preemptions",
    "prompt reports",
    "prompts reported in parts",
    "prefix hits",
    "refused as too large",
    "row faults",
    "stop ids",
)


def run_moves(max_examples: int) -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def seen() -> Iterator[Counter[str]]:
    """The events of a test, which must include everything that can go wrong."""
    seen = SchedulerMachine.seen
    seen.clear()
    yield seen
    assert all(seen[event] for event in EVENTS), seen


@pytest.mark.slow
def test_ten_thousand_moves(seen: Counter[str]) -> None:
    run_moves(300)
    assert seen["moves"] >= 10_000
