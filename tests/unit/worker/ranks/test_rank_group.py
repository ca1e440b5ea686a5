"""The end that the ranks of a tensor-parallel group come to together."""

import threading
import time
from types import SimpleNamespace

import pytest

from tandem_worker.ranks import rank_group
from tests.e2e.waiting import WAIT_S


def test_ranks_that_do_not_end_together_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    has_failed = threading.Event()
    destroyed: list[bool] = []
    monkeypatch.setattr(rank_group, "fail", lambda problem: has_failed.set())
    monkeypatch.setattr(rank_group, "LEAVE_LIMIT_S", 0.2)
    monkeypatch.setattr(rank_group.dist, "destroy_process_group", lambda: destroyed.append(True))
    rank_group.leave_group(SimpleNamespace(close=lambda: None))  # type: ignore[arg-type]
    time.sleep(0.4)
    assert destroyed == [True] and not has_failed.is_set()
    # This runner waits for its device for ever.
    rank_group.leave_group(SimpleNamespace(close=lambda: has_failed.wait(WAIT_S)))  # type: ignore[arg-type]
    assert has_failed.is_set()
