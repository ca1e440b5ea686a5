"""Waits for what another process does."""

import time
from collections.abc import Callable

WAIT_S = 60.0
"""Longer than anything takes on a busy machine, so that only a failure is waited for to the end."""

POLL_INTERVAL_S = 0.01


def wait_until(is_done: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(POLL_INTERVAL_S)
