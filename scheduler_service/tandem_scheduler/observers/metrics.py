"""What the scheduler service measures: an observer that counts the engine's events, and the values that a scrape reads.

A step costs it a few comparisons, however many rows it has.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tandem_scheduler.core.types import FinishReason
from tandem_scheduler.engine.hub import EngineHub
from tandem_scheduler.engine.observer import (
    Event,
    FirstToken,
    PlanMade,
    PlanSent,
    RequestClosed,
    RequestEnded,
    RequestSubmitted,
    StepDone,
    WorkerAttached,
    WorkerLost,
)
from tandem_scheduler.observers import definitions as d
from tandem_shared.metrics.exposition import Metric, Sample, Samples

REASONS = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR)
NOT_REFUSED = dict.fromkeys(("DRAINING", "INVALID_API_KEY", "INVALID_REQUEST", "QUEUE_FULL", "WORKER_UNAVAILABLE"), 0)
"""Prometheus sees the first of a kind as an increase only if it has seen 0 before."""
ENGINE = "0"
"""vLLM numbers the engines behind one port. Here there is one."""


@dataclass(slots=True)
class RequestTimes:
    """When a request came to the engine, was admitted, had its first token, and ended. Seconds of time.monotonic()."""

    submitted_at: float
    admitted_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None


class SchedulerMetrics:
    """Everything that has been counted since the service started. An observer, by tell()."""

    def __init__(self) -> None:
        self._histograms = {metric: metric.histogram() for metric in d.SCHEDULER_METRICS if metric.kind == "histogram"}
        self._num_generated = self._num_losses = 0
        self._num_ended: Counter[FinishReason] = Counter()
        self.times: dict[int, RequestTimes] = {}
        """The times of open requests, by the first sequence's id. They go when RequestClosed is told."""
        # By the ids of sequences that were never admitted.
        self._not_admitted: dict[int, RequestTimes] = {}
        self._lost_at: float | None = None
        self._tell = {
            PlanMade: self._on_plan,
            PlanSent: self._on_sent,
            StepDone: self._on_step,
            RequestSubmitted: self._on_submitted,
            FirstToken: self._on_first_token,
            RequestEnded: self._on_ended,
            RequestClosed: self._on_closed,
            WorkerLost: self._on_lost,
            WorkerAttached: self._on_attached,
        }

    def tell(self, event: Event) -> None:
        """Takes an event of the engine."""
        if (handle := self._tell.get(type(event))) is not None:
            handle(event)  # type: ignore[operator]

    # Steps

    def _on_plan(self, plan: PlanMade) -> None:
        self._histograms[d.ITERATION_TOKENS].observe(plan.num_prompt_tokens + plan.num_decoding_rows)
        for row in plan.plan.added_rows:
            times = self._not_admitted.pop(row.sequence_id, None)
            if times is None:
                # It was admitted before, or is a probe.
                continue
            if times.admitted_at is None:
                times.admitted_at = plan.made_at
                self._histograms[d.QUEUE_TIME].observe(plan.made_at - times.submitted_at)

    def _on_sent(self, sent: PlanSent) -> None:
        self._histograms[d.PLAN_BYTES].observe(sent.num_bytes)

    def _on_step(self, step: StepDone) -> None:
        self._num_generated += len(step.outputs.token_ids)
        self._histograms[d.STEP_TIME].observe(step.step_s)
        self._histograms[d.WIRE_TIME].observe(step.wire_s)

    # Requests

    def _on_submitted(self, request: RequestSubmitted) -> None:
        times = self.times[request.first_sequence_id] = RequestTimes(time.monotonic())
        self._not_admitted |= dict.fromkeys(request.sequence_ids, times)

    def _on_first_token(self, event: FirstToken) -> None:
        times = self.times[event.request.first_sequence_id]
        if times.admitted_at is not None:
            times.first_token_at = time.monotonic()
            self._histograms[d.PREFILL_TIME].observe(times.first_token_at - times.admitted_at)

    def _on_ended(self, event: RequestEnded) -> None:
        times = self.times[event.request.first_sequence_id]
        times.ended_at = now = time.monotonic()
        for sequence_id in event.request.sequence_ids:
            self._not_admitted.pop(sequence_id, None)
        if times.admitted_at is not None:
            self._histograms[d.INFERENCE_TIME].observe(now - times.admitted_at)
        if times.first_token_at is not None:
            self._histograms[d.DECODE_TIME].observe(now - times.first_token_at)

    def _on_closed(self, event: RequestClosed) -> None:
        ended, outcome = event.ended, event.outcome
        request = ended.request
        times = self.times.pop(request.first_sequence_id)
        self._num_ended.update(ended.reasons if outcome is None else outcome.reasons)
        observe: dict[Metric, float] = {
            d.REQUEST_PROMPT_TOKENS: request.num_prompt_tokens,
            d.REQUEST_PARAMS_N: request.num_choices,
            d.REQUEST_PARAMS_MAX_TOKENS: request.max_tokens,
        }
        if times.admitted_at is not None:
            num_prompt_tokens = request.num_prompt_tokens * request.num_choices
            observe[d.REQUEST_COMPUTED_TOKENS] = num_prompt_tokens - ended.num_cached_tokens
        if outcome is not None:
            longest = max(outcome.num_output_tokens)
            observe |= {
                d.REQUEST_MAX_GENERATION_TOKENS: longest,
                d.E2E_LATENCY: outcome.ended_at - outcome.arrived_at,
            }
            for num_tokens in outcome.num_output_tokens:
                self._histograms[d.REQUEST_GENERATION_TOKENS].observe(num_tokens)
            if outcome.first_token_at is not None:
                observe[d.TIME_TO_FIRST_TOKEN] = outcome.first_token_at - outcome.arrived_at
                if longest > 1:
                    observe[d.TIME_PER_OUTPUT_TOKEN] = (outcome.ended_at - outcome.first_token_at) / (longest - 1)
        for metric, value in observe.items():
            self._histograms[metric].observe(value)

    # The worker

    def _on_lost(self, event: WorkerLost) -> None:
        self._num_losses += 1
        self._lost_at = time.monotonic()

    def _on_attached(self, event: WorkerAttached) -> None:
        if self._lost_at is not None:
            self._histograms[d.WORKER_RECOVERY].observe(time.monotonic() - self._lost_at)
            self._lost_at = None

    # A scrape

    def read(self, hub: EngineHub, prefix: str, model_name: str) -> Samples:
        """The values of now. Must be called in the event loop; the result may be encoded elsewhere."""
        return Samples(prefix, {"model_name": model_name, "engine": ENGINE}, self.samples(hub))

    def samples(self, hub: EngineHub) -> list[Sample]:
        """The values of now, without what names share."""
        return [*self._totals(), *_state(hub)]

    @property
    def num_held(self) -> int:
        """How many requests and sequences something is kept of. 0 when none is open."""
        return len(self.times) + len(self._not_admitted)

    def _totals(self) -> Iterator[Sample]:
        for metric, histogram in self._histograms.items():
            if metric is not d.INTER_TOKEN_LATENCY:
                yield metric, {(): histogram.copy()}
        yield d.GENERATION_TOKENS, {(): self._num_generated}
        yield d.WORKER_LOSSES, {(): self._num_losses}
        yield d.REQUEST_SUCCESS, {(reason.value,): self._num_ended[reason] for reason in REASONS}


def _state(hub: EngineHub) -> Iterator[Sample]:
    """What the front ends have counted, and what the engine is at."""
    stats, step_loop = hub.front_end_stats(), hub.step_loop
    yield d.INTER_TOKEN_LATENCY, {(): stats.token_gaps.copy()}
    yield d.REQUESTS_REFUSED, {(reason,): count for reason, count in (NOT_REFUSED | stats.num_refused).items()}
    yield d.WORKER_UP, {(): step_loop.is_connected}
    yield d.DRAINING, {(): hub.is_draining}
    sums = step_loop.step_sums
    yield d.GPU_TIME, {(): sums.gpu_time_ns / 1e9}
    yield d.GPU_IDLE, {(): sums.gpu_gap_ns / 1e9}
    scheduler = step_loop.scheduler
    if scheduler is None:
        # No worker has been seen yet.
        return
    load = scheduler.load()
    yield d.RUNNING, {(): load.num_running_sequences}
    yield d.WAITING, {(): load.num_waiting_sequences}
    yield d.PLANS_IN_FLIGHT, {(): load.num_steps_in_flight}
    yield d.KV_CACHE_USAGE, {(): load.num_used_blocks / load.num_total_blocks}
    blocks = {"free": load.num_free_blocks, "cached": load.num_cached_blocks, "used": load.num_used_blocks}
    yield d.KV_BLOCKS, {(state,): count for state, count in blocks.items()}
    caching = str(step_loop.is_prefix_caching)
    yield d.CACHE_CONFIG, {(str(load.block_size), str(load.num_total_blocks), caching): 1}
    for metric in (d.PROMPT_TOKENS, d.PREFIX_CACHE_QUERIES):
        yield metric, {(): load.num_admitted_prompt_tokens}
    for metric in (d.PROMPT_TOKENS_CACHED, d.PREFIX_CACHE_HITS):
        yield metric, {(): load.num_cached_prompt_tokens}
    yield d.STEPS, {(): load.num_steps}
    yield d.PREEMPTIONS, {(): load.num_preemptions}
    yield d.OVERSHOOT_TOKENS, {(): load.num_overshoot_tokens}
