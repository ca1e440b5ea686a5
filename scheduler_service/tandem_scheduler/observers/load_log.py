"""A line in the log every few seconds while the engine is busy: how busy, and how fast."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from tandem_scheduler.core.types import Counters, Load
from tandem_scheduler.engine.step_loop import StepLoop
from tandem_scheduler.engine.step_sums import StepSums
from tandem_shared.host.log import FIELDS

LINE_EVERY_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Look:
    """The engine at a moment, in seconds of time.monotonic()."""

    at: float
    load: Load
    sums: StepSums


def look(step_loop: StepLoop) -> Look | None:
    """The engine now. None before its first worker."""
    if step_loop.scheduler is None:
        return None
    sums = step_loop.step_sums
    copied = StepSums(sums.num_step_results, sums.step_time_ns, sums.gpu_time_ns, sums.gpu_gap_ns)
    return Look(time.monotonic(), step_loop.scheduler.load(), copied)


def fields_between(before: Look, after: Look) -> dict[str, float] | None:
    """What is logged of the time between two looks. None if the engine had nothing to do."""
    old, new, seconds = before.load, after.load, after.at - before.at
    num_live = new.num_running_sequences + new.num_waiting_sequences
    num_results = after.sums.num_step_results - before.sums.num_step_results
    if not num_live and not num_results:
        return None
    num_prompt_tokens = new.num_admitted_prompt_tokens - old.num_admitted_prompt_tokens
    num_cached = new.num_cached_prompt_tokens - old.num_cached_prompt_tokens
    # Output may turn out to be overshoot, which takes it back.
    num_output = max(new.num_output_tokens - old.num_output_tokens, 0)
    step_ns = after.sums.step_time_ns - before.sums.step_time_ns
    return {
        "running": new.num_running_sequences,
        "waiting": new.num_waiting_sequences,
        "prompt_tokens_per_s": round(num_prompt_tokens / seconds, 1),
        "output_tokens_per_s": round(num_output / seconds, 1),
        "cached_share": round(num_cached / num_prompt_tokens, 3) if num_prompt_tokens else 0.0,
        "kv_cache_usage": round(new.num_used_blocks / new.num_total_blocks, 3),
        "preemptions": new.num_preemptions - old.num_preemptions,
        "step_ms": round(step_ns / num_results / 1e6, 3) if num_results else 0.0,
        "worker_busy_share": round(min(step_ns / 1e9 / seconds, 1.0), 3),
    }


async def log_load(step_loop: StepLoop, on_tick: Callable[[], None]) -> None:
    """Runs until it is cancelled. on_tick is called once a second or more often."""
    before, line_at = look(step_loop), time.monotonic()
    started_at = line_at
    while True:
        await asyncio.sleep(min(1.0, LINE_EVERY_S))
        on_tick()
        if time.monotonic() - line_at < LINE_EVERY_S:
            continue
        line_at = time.monotonic()
        after = look(step_loop)
        if after is None:
            continue
        if load := fields_between(before or _nothing_yet(after, started_at), after):
            logger.info("%s", _line(load), extra={FIELDS: {"load": load}})
        before = after


def _nothing_yet(after: Look, at: float) -> Look:
    """The engine before its first worker came."""
    counters = dict.fromkeys((field.name for field in fields(Counters)), 0)
    return Look(at, replace(after.load, **counters), StepSums())


def _line(load: dict[str, float]) -> str:
    preemptions = f", {load['preemptions']} preemptions" if load["preemptions"] else ""
    return (
        f"load: {load['running']} running, {load['waiting']} waiting; {load['output_tokens_per_s']:,.1f} "
        f"tokens/s out, {load['prompt_tokens_per_s']:,.1f} in ({load['cached_share']:.0%} cached); KV "
        f"{load['kv_cache_usage']:.0%} used{preemptions}; step {load['step_ms']:.2f} ms, worker "
        f"{load['worker_busy_share']:.0%} busy"
    )
