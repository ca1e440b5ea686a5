"""The lines of the log on requests and on the load, made of events and counts that are known."""

import logging
from dataclasses import replace

import pytest

from tandem_scheduler.core.types import FinishReason, Load
from tandem_scheduler.engine.observer import RequestClosed, RequestEnded, RequestSubmitted
from tandem_scheduler.engine.step_sums import StepSums
from tandem_scheduler.engine_interface import RequestOutcome
from tandem_scheduler.observers.load_log import Look, fields_between
from tandem_scheduler.observers.request_log import FEW_PER_SECOND, RequestLog
from tandem_shared.errors import SequenceFailed
from tandem_shared.host.log import FIELDS
from tandem_shared.sampling_fields import RowSampling

STOP, LENGTH, ABORT, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR
LOGGER = "tandem_scheduler.observers.request_log"


def closed(request_id: str = "a", reason: FinishReason = LENGTH) -> RequestClosed:
    submitted = RequestSubmitted(request_id, 0, 1, num_prompt_tokens=20, max_tokens=50, sampling=RowSampling())
    return RequestClosed(
        RequestEnded(submitted, (reason,), 50, 16, None), RequestOutcome(10.0, 10.25, 12.5, (reason,), (48,))
    )


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_request_has_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    log = RequestLog(is_limited=False)
    log.tell(closed("a", STOP))
    several = RequestSubmitted("b", 1, 2, 20, 50, RowSampling())
    log.tell(
        RequestClosed(
            RequestEnded(several, (LENGTH, ERROR), 60, 16, SequenceFailed("it failed")),
            RequestOutcome(10.0, None, 11.0, (LENGTH, ERROR), (50, 10)),
        )
    )
    log.tell(RequestClosed(RequestEnded(several, (ABORT, ABORT), 7, 0, None), None))
    log.tell(closed("a: 1 tokens", STOP))
    assert lines(caplog) == [
        "request a: 20 tokens in (16 cached), 48 out, first token after 0.250 s, all after 2.500 s: stop",
        "request b: 20 tokens in (16 cached), 60 out in 2 choices, all after 1.000 s: length, error (SEQUENCE_FAILED)",
        "request b: 20 tokens in (0 cached), 7 out in 2 choices, its front end has gone: abort",
        "request 'a: 1 tokens': 20 tokens in (16 cached), 48 out, first token after 0.250 s, all after 2.500 s: stop",
    ]
    assert getattr(caplog.records[0], FIELDS) == {
        "request": {
            "id": "a",
            "prompt_tokens": 20,
            "cached_tokens": 16,
            "output_tokens": 48,
            "choices": 1,
            "first_token_s": 0.25,
            "total_s": 2.5,
            "end": "stop",
        }
    }


def test_under_load_few_requests_have_lines_and_the_others_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    now = 100.0
    log = RequestLog(is_limited=True, clock=lambda: now)
    for index in range(25):
        log.tell(closed(str(index), STOP if index % 5 == 0 else LENGTH))
    log.flush()
    assert len(lines(caplog)) == FEW_PER_SECOND
    now = 101.5
    log.flush()
    log.flush()
    log.tell(closed("next"))
    assert lines(caplog)[FEW_PER_SECOND:] == [
        "15 requests more ended: 12 length, 3 stop",
        "request next: 20 tokens in (16 cached), 48 out, first token after 0.250 s, all after 2.500 s: length",
    ]


BEFORE = Look(
    100.0,
    Load(
        num_waiting_sequences=0,
        num_running_sequences=0,
        num_total_blocks=200,
        num_free_blocks=200,
        num_cached_blocks=0,
        num_used_blocks=0,
        block_size=16,
        num_steps_in_flight=0,
        num_steps=10,
        num_preemptions=1,
        num_worker_losses=0,
        num_prompt_tokens=1000,
        num_cached_prompt_tokens=100,
        num_output_tokens=500,
        num_overshoot_tokens=3,
        num_admitted_prompt_tokens=900,
    ),
    StepSums(10, 50_000_000, 0, 0),
)


def test_the_load_of_a_busy_engine() -> None:
    load = replace(
        BEFORE.load,
        num_waiting_sequences=2,
        num_running_sequences=5,
        num_free_blocks=150,
        num_used_blocks=50,
        num_preemptions=4,
        num_cached_prompt_tokens=400,
        num_admitted_prompt_tokens=1900,
        num_output_tokens=2500,
    )
    fields = fields_between(BEFORE, Look(110.0, load, StepSums(510, 5_050_000_000, 0, 0)))
    assert fields == {
        "running": 5,
        "waiting": 2,
        "prompt_tokens_per_s": 100.0,
        "output_tokens_per_s": 200.0,
        "cached_share": 0.3,
        "kv_cache_usage": 0.25,
        "preemptions": 3,
        "step_ms": 10.0,
        "worker_busy_share": 0.5,
    }


def test_an_idle_engine_has_no_line_and_one_that_waits_for_its_worker_has() -> None:
    assert fields_between(BEFORE, replace(BEFORE, at=110.0)) is None
    waiting = replace(BEFORE, at=110.0, load=replace(BEFORE.load, num_waiting_sequences=3))
    fields = fields_between(BEFORE, waiting)
    assert fields is not None and (fields["waiting"], fields["step_ms"]) == (3, 0.0)
