"""Far more work than the engine can do, a thousand streams at once, and readers that don't read.

The worker is the fake one with a fixed step time, so what an engine can serve is known (`capacity_per_s`). The steps
are long enough for two cores to carry the clients and the services.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tandem_scheduler.front_end.live_request import MAX_UNREAD_BYTES
from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.overload.fairness import fairness
from tests.chaos.support.crowd import Crowd, CrowdProcess, ends_of
from tests.chaos.support.fake_engine import FakeEngine, capacity_per_s, running_fake_engine
from tests.chaos.support.memory import MIB, Watch, faults_in_books

OVERLOAD = 20
STEP_MS, NUM_ROWS, NUM_TOKENS = 50, 16, 20
MAX_NUM_WAITING, MAX_NUM_WAITING_TOKENS = 32, 3200
PROMPT_LENGTHS = (4, 400)
"""Prompts of the first length reach the limit of waiting sequences, prompts of the second that of waiting tokens."""
REFUSALS = {
    "sequences": re.compile(r"\d+ sequences are waiting"),
    "tokens": re.compile(r"\d+ prompt tokens are waiting"),
    "calls": re.compile(r"calls of this connection are open"),
}
"""Which limit was reached, by the text of the refusal."""
MAX_GROWTH_MIB = 8.0
"""How far a process's peak memory in the second half of a flood may exceed its peak in the first half."""

NUM_CLIENTS = 2
"""Client processes that share the streams."""
MIN_JAIN = 0.95
MAX_GAP_RATIO = 5.0
MAX_UNREAD_MIB = MAX_UNREAD_BYTES / MIB
BEHIND = "RESOURCE_EXHAUSTED OutputTooLarge"
SLACK_MIB = 32.0
"""Growth that is allowed a process beside what stalled readers leave unread."""
FAR_BEHIND = {"num_streams": 32, "num_tokens": 1980, "num_stalled": 2, "num_choices": 64, "num_logprobs": 20}
"""Requests with as much output in a step as is allowed, so that a stalled reader is soon far behind."""


def run(trial: str, **asked: Any) -> Found:
    """trial: flood or streams."""
    return {"trial": trial, **(flood(**asked) if trial == "flood" else streams(**asked))}


def flood(front_ends: int, seconds: float) -> Found:
    """Offers OVERLOAD times the calls that can be served, for `seconds` at each prompt length."""
    rate_per_s = OVERLOAD * capacity_per_s(NUM_ROWS, NUM_TOKENS, STEP_MS)
    settings = {"max_num_waiting": MAX_NUM_WAITING, "max_num_waiting_tokens": MAX_NUM_WAITING_TOKENS}
    with running_fake_engine(step_ms=STEP_MS, num_rows=NUM_ROWS, front_ends=front_ends, **settings) as fake:
        floods = [_flood_once(fake, length, rate_per_s, seconds) for length in PROMPT_LENGTHS]
        faults = faults_in_books(fake.engine)
    return {"front_ends": front_ends, "floods": floods, "faults": faults}


def _flood_once(fake: FakeEngine, prompt_length: int, rate_per_s: float, seconds: float) -> Found:
    crowd = Crowd(
        fake.engine.scheduler.address,
        num_calls=int(rate_per_s * seconds),
        num_tokens=NUM_TOKENS,
        rate_per_s=rate_per_s,
        prompt_length=prompt_length,
    )
    with CrowdProcess(crowd) as clients, Watch(fake.engine, interval_s=0.2) as watch:
        calls = clients.calls()
    refused = [call for call in calls if call.code == "RESOURCE_EXHAUSTED"]
    num_waiting = max(load.num_waiting_sequences for load in watch.loads)
    return {
        "prompt_tokens": prompt_length,
        "calls": len(calls),
        "calls_per_s": round(len(calls) / (max(call.began for call in calls) - min(call.began for call in calls)), 1),
        "wanted_per_s": rate_per_s,
        "ends": ends_of(calls),
        "wrong": sum(not call.is_right for call in calls),
        "refused_without_retry_info": sum(not call.says_when_to_retry for call in refused),
        "full": dict(Counter(what_is_full(call.error) for call in refused)),
        "most_waiting": num_waiting,
        "most_tokens_waiting": num_waiting * prompt_length,
        "growth_mib": watch.late_growth_mib(),
    }


def what_is_full(refusal: str) -> str:
    return next((what for what, pattern in REFUSALS.items() if pattern.search(refusal)), "something else")


def streams(
    front_ends: int,
    step_ms: int,
    num_streams: int,
    num_tokens: int,
    num_stalled: int,
    num_choices: int = 1,
    num_logprobs: int = 0,
) -> Found:
    """Runs num_streams streams at once. num_stalled of them are not read until the others have ended; num_choices and
    num_logprobs are of the stalled ones alone.
    """
    num_rows = num_streams + num_stalled * (num_choices - 1)
    with running_fake_engine(step_ms=step_ms, num_rows=num_rows, front_ends=front_ends) as fake:
        crowds = [
            CrowdProcess(
                Crowd(
                    fake.engine.scheduler.address,
                    num_calls=num_streams // NUM_CLIENTS,
                    num_tokens=num_tokens,
                    num_stalled=num_stalled // NUM_CLIENTS,
                    num_choices=num_choices,
                    num_logprobs=num_logprobs,
                    first_number=client * num_streams,
                )
            )
            for client in range(NUM_CLIENTS)
        ]
        with contextlib.ExitStack() as stack:
            watch = stack.enter_context(Watch(fake.engine, interval_s=0.2))
            for crowd in crowds:
                stack.enter_context(crowd)
            parts = [crowd.calls() for crowd in crowds]
        faults = faults_in_books(fake.engine)
    stalled = [call for calls in parts for call in calls[: num_stalled // NUM_CLIENTS]]
    read = [call for calls in parts for call in calls[num_stalled // NUM_CLIENTS :]]
    found = fairness([call.arrivals for call in read])
    return {
        "front_ends": front_ends,
        "step_ms": step_ms,
        "streams": num_streams,
        "most_running": max(load.num_running_sequences for load in watch.loads),
        "ends": ends_of(read),
        "stalled": num_stalled,
        "choices_of_stalled": num_choices,
        "ends_of_stalled": ends_of(stalled),
        "most_tokens_behind": max((count for call in stalled for _, count in call.arrivals), default=0),
        "wrong": sum(not call.is_right for call in [*read, *stalled]),
        **{name: round(value, 4) for name, value in vars(found).items()},
        "growth_mib": watch.growth_mib(),
        "faults": faults,
    }


# The table


def rows(pieces: Sequence[Found]) -> list[Row]:
    floods = [piece for piece in pieces if piece["trial"] == "flood"]
    crowded = [piece for piece in pieces if piece["trial"] == "streams"]
    stalled = [piece for piece in crowded if piece["choices_of_stalled"] == 1]
    far_behind = [piece for piece in crowded if piece["choices_of_stalled"] > 1]
    table = [_answers_row(floods), _bounds_row(floods)] if floods else []
    table += [_fairness_row(crowded)] if crowded else []
    table += [_stalled_row(stalled)] if stalled else []
    return table + ([_far_behind_row(far_behind)] if far_behind else [])


def _answers_row(pieces: Sequence[Found]) -> Row:
    floods = [flood for piece in pieces for flood in piece["floods"]]
    ends = sum((Counter(flood["ends"]) for flood in floods), Counter())
    num_wrong = sum(flood["wrong"] for flood in floods)
    num_mute = sum(flood["refused_without_retry_info"] for flood in floods)
    faults = [fault for piece in pieces for fault in piece["faults"]]
    slowest = min(flood["calls_per_s"] / flood["wanted_per_s"] for flood in floods) * OVERLOAD
    return Row(
        promise="More work than can be done: what is accepted gets its answer, the rest is told to come again",
        tried=f"{ends.total()} calls at {slowest:.0f} times capacity or more, {_layouts(pieces)}",
        found=f"{_listed(ends)}; {num_wrong} wrong answers, {num_mute} refusals without RetryInfo{_and(faults)}",
        is_met=set(ends) == {"OK", "RESOURCE_EXHAUSTED QueueFull"}
        and not (num_wrong or num_mute or faults)
        and slowest > 0.8 * OVERLOAD,
    )


def _bounds_row(pieces: Sequence[Found]) -> Row:
    floods = [flood for piece in pieces for flood in piece["floods"]]
    waiting, tokens = (max(flood[key] for flood in floods) for key in ("most_waiting", "most_tokens_waiting"))
    full = sum((Counter(flood["full"]) for flood in floods), Counter())
    growth = max(max(flood["growth_mib"].values()) for flood in floods)
    return Row(
        promise="Then what waits is bounded in sequences and in prompt tokens, and no process grows",
        tried=f"the same, with --max-num-waiting {MAX_NUM_WAITING} and --max-num-waiting-tokens "
        f"{MAX_NUM_WAITING_TOKENS}; refusals because of {_listed(full)}",
        found=f"{waiting} sequences and {tokens} tokens waiting at most; in the second half of a flood a process held "
        f"{growth:.1f} MiB more than in the first at most (allowed: {MAX_GROWTH_MIB:.0f})",
        is_met=waiting <= MAX_NUM_WAITING
        and tokens <= MAX_NUM_WAITING_TOKENS
        and {"sequences", "tokens"} <= set(full) <= set(REFUSALS)
        and growth <= MAX_GROWTH_MIB,
    )


def _fairness_row(pieces: Sequence[Found]) -> Row:
    jain = min(piece["jain"] for piece in pieces)
    ratio = max(piece["longest_gap_s"] / piece["median_gap_s"] for piece in pieces)
    ends = sum((Counter(piece["ends"]) for piece in pieces), Counter())
    num_wrong = sum(piece["wrong"] for piece in pieces)
    faults = [fault for piece in pieces for fault in piece["faults"]]
    window_s = sum(piece["window_s"] for piece in pieces)
    return Row(
        promise="Streams that run at once are served alike, and none pauses",
        tried=f"{' and '.join(str(piece['streams']) for piece in pieces)} streams at once, {_layouts(pieces)}, for "
        f"{window_s:.0f} s in which all ran",
        found=f"Jain's index of tokens {jain:.4f} or more; the longest gap {ratio:.1f} times the median gap at most; "
        f"{_listed(ends)}, {num_wrong} wrong answers{_and(faults)}",
        is_met=_are_fair(pieces)
        and set(ends) == {"OK"}
        and not (num_wrong or faults)
        and all(piece["most_running"] >= piece["streams"] for piece in pieces),
    )


def _stalled_row(pieces: Sequence[Found]) -> Row:
    ends = sum((Counter(piece["ends_of_stalled"]) for piece in pieces), Counter())
    behind = min(piece["most_tokens_behind"] for piece in pieces)
    return Row(
        promise="A reader that stalls slows nobody, and has its answer when it reads on",
        tried=f"{sum(piece['stalled'] for piece in pieces)} of those streams not read until the others had ended",
        found=f"{_listed(ends)}; then up to {behind} tokens came in one message",
        is_met=set(ends) == {"OK"} and behind > 1 and _are_fair(pieces),
    )


def _far_behind_row(pieces: Sequence[Found]) -> Row:
    ends = sum((Counter(piece["ends_of_stalled"]) for piece in pieces), Counter())
    most = max(max(piece["growth_mib"].values()) - MAX_UNREAD_MIB * piece["stalled"] for piece in pieces)
    return Row(
        promise=f"A reader that is {MAX_UNREAD_MIB:.0f} MiB behind ends, slows nobody, and costs no more memory",
        tried=f"{sum(piece['stalled'] for piece in pieces)} such readers, each of {pieces[0]['choices_of_stalled']} "
        f"choices with log-probabilities, among {sum(piece['streams'] - piece['stalled'] for piece in pieces)} other "
        f"streams, {_layouts(pieces)}",
        found=f"{_listed(ends)}; no process grew by more than {MAX_UNREAD_MIB:.0f} MiB a reader and {max(most, 0):.0f} "
        f"MiB (allowed: {SLACK_MIB:.0f})",
        is_met=set(ends) == {BEHIND} and most <= SLACK_MIB and _are_fair(pieces),
    )


def _are_fair(pieces: Sequence[Found]) -> bool:
    """Whether the streams that were read were served evenly, although others were not read."""
    return all(
        piece["jain"] >= MIN_JAIN and piece["longest_gap_s"] <= MAX_GAP_RATIO * piece["median_gap_s"]
        for piece in pieces
    )


def _layouts(pieces: Sequence[Found]) -> str:
    return " and ".join(f"with {count} front-end processes" for count in sorted({p["front_ends"] for p in pieces}))


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def _and(faults: Sequence[str]) -> str:
    return f"; left at the end: {', '.join(faults)}" if faults else ""


def _streams(**asked: Any) -> dict[str, Any]:
    return {"trial": "streams", **asked}


PART = Part(
    "overload",
    run,
    rows,
    pieces={
        Form.SHORT: (
            {"trial": "flood", "front_ends": 2, "seconds": 1.5},
            _streams(front_ends=0, step_ms=250, num_streams=256, num_tokens=12, num_stalled=8),
        ),
        Form.LONG: (
            {"trial": "flood", "front_ends": 0, "seconds": 5.0},
            _streams(front_ends=2, step_ms=400, num_streams=1000, num_tokens=20, num_stalled=40),
        ),
        Form.FULL: tuple(
            piece
            for front_ends in (0, 2)
            for piece in (
                {"trial": "flood", "front_ends": front_ends, "seconds": 60.0},
                _streams(front_ends=front_ends, step_ms=500, num_streams=1000, num_tokens=240, num_stalled=40),
                _streams(front_ends=front_ends, step_ms=100, **FAR_BEHIND),
            )
        ),
    },
)
