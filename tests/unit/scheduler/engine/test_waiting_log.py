"""What the log says while there is no worker."""

import logging

import pytest

from tandem_scheduler.engine import waiting_log
from tandem_scheduler.engine.waiting_log import MAX_PAUSE_S, MAX_REASONS, WaitingLog


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting_log, "time", clock)
    caplog.set_level(logging.INFO)
    return clock


def test_a_wait_is_said_once_and_then_ever_less_often(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    log = WaitingLog("gpu-host:50052")
    times = []
    for _ in range(3600):
        num_lines = len(caplog.records)
        log.say("refused")
        if len(caplog.records) > num_lines:
            times.append(clock.now - 100)
        clock.now += 1
    assert times == [0, 5, 15, 35, 75, 155, 315, *range(615, 3600, int(MAX_PAUSE_S))]
    first, second, *_ = caplog.records
    assert first.getMessage() == "waiting for the worker at gpu-host:50052: refused"
    assert second.getMessage() == "still waiting for the worker at gpu-host:50052, for 5 s: refused"
    assert [record.levelname for record in caplog.records] == ["WARNING", *["INFO"] * (len(times) - 1)]


def test_a_new_reason_and_a_new_wait_are_said_at_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    log = WaitingLog("a:1")
    for reason in ("refused", "another model", "refused", "another model"):
        log.say(reason)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["refused", "another model"]
    log.end()
    log.say("refused")
    assert len(caplog.records) == 3 and caplog.records[-1].levelname == "WARNING"


def test_reasons_without_end_do_not_fill_the_log(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    log = WaitingLog("a:1")
    for number in range(1000):
        log.say(f"reason {number}")
    assert len(caplog.records) == MAX_REASONS
