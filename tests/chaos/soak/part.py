"""Streams for a long time, many of which are cut short in every way that a client has, with too few blocks for all.

The soak looks for what grows or gets lost slowly: each process's memory, blocks, and sequences that never end.
"""

import random
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import grpc

from tandem.v1 import control_pb2, control_pb2_grpc, inference_pb2
from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.soak.trend import trend
from tests.chaos.support.engines import running_engine
from tests.chaos.support.load import Answer, Load, WrongStream
from tests.chaos.support.memory import MIB, Watch, faults_in_books

NUM_STREAMS = 32
NUM_TOKENS = 20
NUM_BLOCKS = 200
"""A third of what the streams would fill, so that sequences are preempted all the time."""
MAX_SLOPE_MIB_PER_MIN = 1.0
FATES = {"whole": 55, "cancelled": 15, "aborted": 15, "out of time": 15}
"""How a call ends, and the share of calls in percent."""
MAX_MESSAGES = 30
"""The most messages that come before a call is cut short."""
MAX_DEADLINE_S = 1.5
MAX_WASTED = 5.0
"""Mean number of tokens computed for a call after it was cut short. If it ran on it would get dozens."""
COUNTERS = (
    "num_steps",
    "num_preemptions",
    "num_worker_losses",
    "num_prompt_tokens",
    "num_cached_prompt_tokens",
    "num_output_tokens",
    "num_overshoot_tokens",
)


class RoughLoad(Load):
    """A load that cuts many of its calls short: at random messages, and by deadlines that pass most of the time."""

    def __init__(self, *arguments: Any, seed: int, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._rng = random.Random(seed)

    async def _open(self) -> None:
        await super()._open()
        self._control = control_pb2_grpc.ControlServiceStub(self._channels[0])

    async def _try_once(self, number: int, request: inference_pb2.GenerateStreamRequest) -> bool:
        [fate] = self._rng.choices(list(FATES), weights=list(FATES.values()))
        if fate == "whole":
            return await super()._try_once(number, request)
        try:
            await self._cut_short(number, request, fate)
        except WrongStream as error:
            self.counts["wrong"] += 1
            self._note(f"{request.request_id}, {fate}: {error}")
        except grpc.aio.AioRpcError as error:
            if (fate, error.code()) != ("out of time", grpc.StatusCode.DEADLINE_EXCEEDED):
                self._note(f"{request.request_id}, {fate}, ended {error.code().name}: {error.details()}")
        self.counts[fate] += 1
        return True

    async def _cut_short(self, number: int, request: inference_pb2.GenerateStreamRequest, fate: str) -> None:
        truth = self._truth[number]
        timeout_s = self._rng.uniform(0.0, MAX_DEADLINE_S) if fate == "out of time" else self._timeout_s
        num_left = self._rng.randrange(MAX_MESSAGES)
        call = self._stubs[number % self.num_connections].GenerateStream(request, timeout=timeout_s)
        answer = Answer()
        if num_left == 0 and fate == "cancelled":
            call.cancel()
            return
        async for message in call:
            answer.add(message)
            self.counts["tokens"] += len(message.token_ids)
            answer.check(truth, is_ended=False)
            num_left -= 1
            if num_left == 0 and fate == "cancelled":
                call.cancel()
                return
            if num_left == 0 and fate == "aborted":
                await self._abort(request.request_id)
        _check_aborted(answer, truth)

    async def _abort(self, request_id: str) -> None:
        try:
            await self._control.Abort(control_pb2.AbortRequest(request_id=request_id), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            # The request may have ended by itself.
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise


def _check_aborted(answer: Answer, truth: Answer) -> None:
    """Each choice must have all of its tokens or end with ABORT, and the usage must count the tokens that came."""
    for choice, expected in truth.token_ids.items():
        reason = answer.finishes.get(choice)
        is_whole = (answer.token_ids.get(choice), reason) == (expected, truth.finishes[choice])
        if not is_whole and reason != inference_pb2.FINISH_REASON_ABORT:
            raise WrongStream(f"choice {choice} has {len(answer.token_ids.get(choice, []))} tokens and ended {reason}")
    num_tokens = sum(map(len, answer.token_ids.values()))
    if answer.num_output_tokens != num_tokens:
        raise WrongStream(f"usage says {answer.num_output_tokens} tokens, not {num_tokens}")


def run(seconds: float, watched_s: float, seed: int, max_slope: float = MAX_SLOPE_MIB_PER_MIN) -> Found:
    """watched_s: the last seconds, over which slopes of memory are fitted; 0 for no slopes. max_slope: what the upper
    ends of the slopes' intervals may be, in MiB a minute.
    """
    flags = {"--api-server-count": 2, "--max-num-seqs": 24}
    with running_engine(
        worker_flags=["--num-blocks", str(NUM_BLOCKS)],
        scheduler_flags=[text for name, value in flags.items() for text in (name, str(value))],
    ) as engine:
        address = engine.scheduler.address
        with RoughLoad(address, NUM_STREAMS, num_tokens=NUM_TOKENS, seed=seed) as load:
            num_before = engine.load().num_output_tokens
            load.start()
            with Watch(engine) as watch:
                time.sleep(seconds)
            load.finish()
        faults = faults_in_books(engine)
        num_tokens = engine.load().num_output_tokens - num_before
    fates = {fate: load.counts[fate] for fate in FATES if fate != "whole"}
    faults += [
        f"{counter} fell"
        for counter in COUNTERS
        if any(getattr(a, counter) > getattr(b, counter) for a, b in pairwise(watch.loads))
    ]
    return {
        "seconds": seconds,
        "watched_s": watched_s,
        "max_slope": max_slope,
        **load.found,
        "fates": fates,
        "tokens_for_nobody": num_tokens - load.counts["tokens"],
        "preemptions": watch.loads[-1].num_preemptions,
        "faults_in_books": faults,
        "rss_mib": {name: round(rss[-1] / MIB, 1) for name, rss in watch.rss.items()},
        "slopes": slopes(watch, watched_s) if watched_s else {},
    }


def slopes(watch: Watch, seconds: float) -> dict[str, list[float]]:
    """By process: the slope of its memory over the last `seconds` and the ends of its interval, in MiB a minute."""
    first = next(index for index, at in enumerate(watch.times) if at >= watch.times[-1] - seconds)
    found = {name: trend(watch.times[first:], rss[first:]) for name, rss in watch.rss.items()}
    return {
        name: [round(60 * value / MIB, 4) for value in (each.slope, each.low, each.high)]
        for name, each in found.items()
    }


def rows(pieces: Sequence[Found]) -> list[Row]:
    table = [_books_row(pieces)]
    watched = [piece for piece in pieces if piece["slopes"]]
    return table + ([_memory_row(watched)] if watched else [])


def _books_row(pieces: Sequence[Found]) -> Row:
    fates = {fate: sum(piece["fates"][fate] for piece in pieces) for fate in pieces[0]["fates"]}
    faults = [fault for piece in pieces for fault in (*piece["faults_in_books"], *piece["faults"])]
    num_wrong, num_answers = (sum(piece[key] for piece in pieces) for key in ("wrong", "answers"))
    num_wasted = sum(piece["tokens_for_nobody"] for piece in pieces) / max(sum(fates.values()), 1)
    num_preemptions = sum(piece["preemptions"] for piece in pieces)
    return Row(
        promise="Whatever calls are cut short, nothing is left of them, and the others have their answers",
        tried=f"{_length(pieces)} of {NUM_STREAMS} streams: {', '.join(f'{n} {fate}' for fate, n in fates.items())}; "
        f"{num_preemptions} preemptions",
        found=f"{num_answers} whole answers, {num_wrong} wrong; {num_wasted:.1f} tokens computed for each call cut "
        f"short that nobody read (allowed: {MAX_WASTED:g}); at the end no block is used, nothing runs or waits; no "
        "counter ever fell" + (f"; but {', '.join(faults)}" if faults else ""),
        is_met=not (faults or num_wrong)
        and 0 <= num_wasted <= MAX_WASTED
        and num_answers > 0
        and num_preemptions > 0
        and all(fates.values()),
    )


def _memory_row(pieces: Sequence[Found]) -> Row:
    highest = {name: max(piece["slopes"][name][2] for piece in pieces) for name in pieces[0]["slopes"]}
    allowed = max(piece["max_slope"] for piece in pieces)
    return Row(
        promise="No process grows with time",
        tried=f"the same, resident memory each second, slopes of the last {pieces[0]['watched_s'] / 60:g} minutes",
        found="upper ends of the slopes' 95% intervals in MiB a minute: "
        + ", ".join(f"{name} {high:.2f}" for name, high in highest.items())
        + f" (allowed: {allowed:g})",
        is_met=all(high < allowed for high in highest.values()),
    )


def _length(pieces: Sequence[Found]) -> str:
    seconds = sum(piece["seconds"] for piece in pieces)
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} s"


PART = Part(
    "soak",
    run,
    rows,
    pieces={
        Form.SHORT: (),
        # Two minutes after one minute of warm-up tell little about a slope, so the limit is wide.
        Form.LONG: ({"seconds": 180.0, "watched_s": 125.0, "seed": 2, "max_slope": 16.0},),
        Form.FULL: ({"seconds": 1800.0, "watched_s": 1200.0, "seed": 3},),
    },
)
