"""The spans of requests: an observer that gathers what happens to a request, and makes its spans when its call ends.

A call is a server span of the scheduler. Its children are the phases queue, prefill and decode, which follow each
other. Below them are spans of the worker: the steps that computed parts of the prompt, or computed tokens again after
the request had lost its row. A token has no span, so a step in which all rows decode costs a lookup.

docs/decisions/0013-traces.md says why the worker makes no spans itself.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tandem_scheduler.core.types import FinishReason
from tandem_scheduler.engine.observer import (
    Event,
    PlanMade,
    RequestClosed,
    RequestSubmitted,
    StepDone,
    WorkerAttached,
    WorkerLost,
)
from tandem_scheduler.engine_interface import TraceContext
from tandem_scheduler.observers.metrics import RequestTimes
from tandem_shared import VERSION
from tandem_shared.errors import reason_of
from tandem_shared.tracing import SpanExport

MAX_STEPS = 64
"""The most spans of steps that a request has, so that one long prompt does not fill the queue of all."""

Attributes = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of the worker that computed tokens of a request. Times are seconds of time.monotonic()."""

    tracer: Tracer
    started_at: float
    ended_at: float
    attributes: Attributes


@dataclass(slots=True, eq=False)
class _Call:
    """What has happened to a request so far."""

    request: RequestSubmitted
    events: list[tuple[str, float, Attributes]] = field(default_factory=list)
    """Name, time and attributes."""
    steps: list[_Step] = field(default_factory=list)
    left_at: dict[int, float | None] = field(default_factory=dict)
    """Sequences that had a row and lost it, by id, until they have one again: when they were preempted. None if it was
    the worker that was lost.
    """


class RequestTraces:
    """An observer, by tell(). It takes the times of requests from the metrics, so it must be told before them of the
    end of a call.
    """

    def __init__(self, export: SpanExport, model: str, times: Mapping[int, RequestTimes]) -> None:
        """model: the name under which clients know it. times: those of open requests, by the first sequence's id."""
        self._export = export
        self._model = model
        self._times = times
        self._tracer = export.provider("tandem-scheduler").get_tracer("tandem", VERSION)
        self._worker_tracer = self._tracer
        # By the ids of their sequences.
        self._calls: dict[int, _Call] = {}
        # Which sequence has which row of the worker's batch.
        self._rows: dict[int, int] = {}
        # Of plans under way, by their steps' ids: parts of prompts, with the number of tokens of each, and sequences
        # whose rows are free because their last token is under way.
        self._chunks: dict[int, list[tuple[_Call, int]]] = {}
        self._ending: dict[int, list[int]] = {}
        self._tell = {
            RequestSubmitted: self._on_submitted,
            PlanMade: self._on_plan,
            StepDone: self._on_step,
            RequestClosed: self._on_closed,
            WorkerAttached: self._on_attached,
            WorkerLost: self._on_lost,
        }

    def tell(self, event: Event) -> None:
        """Takes an event of the engine."""
        if (handle := self._tell.get(type(event))) is not None:
            handle(event)  # type: ignore[operator]

    @property
    def num_held(self) -> int:
        """How many sequences something is kept of. 0 when no call is open."""
        return len(self._calls)

    def _on_submitted(self, request: RequestSubmitted) -> None:
        if request.trace is not None:
            self._calls |= dict.fromkeys(request.sequence_ids, _Call(request))

    def _on_plan(self, made: PlanMade) -> None:
        plan = made.plan
        removed = [self._rows.pop(row) for row in plan.removed_rows.tolist()]
        # A plan doesn't say which of them were preempted. Those that are have a row again some day, the others end.
        if made.num_preempted:
            for sequence_id in removed:
                if (call := self._calls.get(sequence_id)) is not None:
                    call.left_at[sequence_id] = made.made_at
        if len(removed) > made.num_preempted:
            self._ending[plan.step_id] = removed
        for new in plan.added_rows:
            self._rows[new.row] = new.sequence_id
            call = self._calls.get(new.sequence_id)
            if call is not None and new.sequence_id in call.left_at:
                choice = {"tandem.choice.index": new.sequence_id - call.request.first_sequence_id}
                if (left_at := call.left_at.pop(new.sequence_id)) is not None:
                    call.events.append(("preempted", left_at, choice))
                call.events.append(("resumed", made.made_at, choice))
        chunks = [
            (call, num_tokens)
            for row, num_tokens in zip(plan.chunk_rows.tolist(), plan.chunk_num_tokens.tolist(), strict=True)
            if (call := self._calls.get(self._rows[row])) is not None
        ]
        if chunks:
            self._chunks[plan.step_id] = chunks

    def _on_step(self, step: StepDone) -> None:
        made, times = step.plan, step.result.times
        self._ending.pop(made.plan.step_id, None)
        for call, num_tokens in self._chunks.pop(made.plan.step_id, ()):
            if len(call.steps) == MAX_STEPS:
                continue
            # The worker's clock may be another: only its differences count, and both ways of the wire as equally long.
            sampled_ns = max(times.sampled_ns, times.received_ns)
            ended_at = step.received_at - step.wire_s / 2 - (times.sent_ns - sampled_ns) / 1e9
            attributes = {
                "tandem.step.id": made.plan.step_id,
                "tandem.step.num_request_tokens": num_tokens,
                "tandem.step.num_prompt_tokens": made.num_prompt_tokens,
                "tandem.step.num_decoding_rows": made.num_decoding_rows,
                "tandem.step.gpu_time": times.gpu_duration_ns / 1e9,
            }
            call.steps.append(_Step(self._worker_tracer, ended_at - step.step_s, ended_at, attributes))

    def _on_attached(self, attached: WorkerAttached) -> None:
        provider = self._export.provider("tandem-worker", attached.worker.worker_instance_id)
        self._worker_tracer = provider.get_tracer("tandem", VERSION)

    def _on_lost(self, lost: WorkerLost) -> None:
        now = time.monotonic()
        told = set()
        for sequence_id in itertools.chain(self._rows.values(), *self._ending.values()):
            if (call := self._calls.get(sequence_id)) is not None:
                call.left_at[sequence_id] = None
                if call not in told:
                    told.add(call)
                    call.events.append(("worker lost", now, {"tandem.worker.loss": lost.reason}))
        for each in (self._rows, self._chunks, self._ending):
            each.clear()

    def _on_closed(self, closed: RequestClosed) -> None:
        request = closed.ended.request
        call = self._calls.get(request.first_sequence_id)
        if call is not None and request.trace is not None:
            for sequence_id in request.sequence_ids:
                del self._calls[sequence_id]
            self._make_spans(call, request.trace, closed, self._times[request.first_sequence_id])

    def _make_spans(self, call: _Call, trace: TraceContext, closed: RequestClosed, times: RequestTimes) -> None:
        # Spans are stamped with Unix time.
        offset_ns = time.time_ns() - time.monotonic_ns()

        def unix_ns(seconds: float) -> int:
            return offset_ns + round(1e9 * seconds)

        carrier = {"traceparent": trace.traceparent, "tracestate": trace.tracestate}
        server = self._tracer.start_span(
            trace.rpc,
            TraceContextTextMapPropagator().extract(carrier, Context()),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": trace.rpc},
            start_time=unix_ns(closed.outcome.arrived_at if closed.outcome is not None else times.submitted_at),
        )
        if server.is_recording():
            server.set_attributes(_attributes(closed, times, self._model))
            _set_status(server, closed)
            for name, at, attributes in call.events:
                server.add_event(name, attributes, unix_ns(at))
            for name, start, end in _phases(times):
                context = set_span_in_context(server, Context())
                phase = self._tracer.start_span(name, context, start_time=unix_ns(start))
                for step in call.steps:
                    if start <= step.started_at < end:
                        _make_step(step, phase, unix_ns(step.started_at), unix_ns(step.ended_at))
                phase.end(unix_ns(end))
        server.end(unix_ns(time.monotonic()))


def _make_step(step: _Step, phase: Span, start_ns: int, end_ns: int) -> None:
    context = set_span_in_context(phase, Context())
    step.tracer.start_span("step", context, attributes=step.attributes, start_time=start_ns).end(end_ns)


def _phases(times: RequestTimes) -> Iterator[tuple[str, float, float]]:
    """Those that the request came to: name, start and end, in seconds of time.monotonic()."""
    assert times.ended_at is not None, "the call has ended"
    starts = {"queue": times.submitted_at, "prefill": times.admitted_at, "decode": times.first_token_at}
    reached = [(name, start) for name, start in starts.items() if start is not None]
    ends = [*(start for _, start in reached[1:]), times.ended_at]
    for (name, start), end in zip(reached, ends, strict=True):
        yield name, start, end


def _attributes(closed: RequestClosed, times: RequestTimes, model: str) -> Attributes:
    """Those of OpenTelemetry's conventions for generative AI and, where these have none, vLLM's. Tokens are under
    vLLM's names too, which are those of older conventions. Times are in seconds.
    """
    ended, outcome, request = closed.ended, closed.outcome, closed.ended.request
    reasons = ended.reasons if outcome is None else outcome.reasons
    num_output_tokens = ended.num_output_tokens if outcome is None else sum(outcome.num_output_tokens)
    attributes: Attributes = {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.n": request.num_choices,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
        "gen_ai.response.finish_reasons": [reason.value for reason in reasons],
        "gen_ai.usage.input_tokens": request.num_prompt_tokens,
        "gen_ai.usage.prompt_tokens": request.num_prompt_tokens,
        "gen_ai.usage.output_tokens": num_output_tokens,
        "gen_ai.usage.completion_tokens": num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": ended.num_cached_tokens,
    }
    if outcome is not None:
        attributes["gen_ai.latency.e2e"] = outcome.ended_at - outcome.arrived_at
        if outcome.first_token_at is not None:
            attributes["gen_ai.latency.time_to_first_token"] = outcome.first_token_at - outcome.arrived_at
    names = {"queue": "time_in_queue", "prefill": "time_in_model_prefill", "decode": "time_in_model_decode"}
    for phase, start, end in _phases(times):
        attributes[f"gen_ai.latency.{names[phase]}"] = end - start
    if times.admitted_at is not None and times.ended_at is not None:
        attributes["gen_ai.latency.time_in_model_inference"] = times.ended_at - times.admitted_at
    return attributes


def _set_status(span: Span, closed: RequestClosed) -> None:
    """An error, unless every choice ended by itself."""
    error, outcome = closed.ended.error, closed.outcome
    reasons = closed.ended.reasons if outcome is None else outcome.reasons
    if error is not None:
        kind, description = reason_of(type(error)), str(error)
    elif outcome is None:
        kind, description = "FRONT_END_LOST", "its front end has gone"
    elif FinishReason.ERROR in reasons:
        kind, description = "OUTPUT_FAILED", "the output could not be given out"
    elif FinishReason.ABORT in reasons:
        kind, description = "ABORTED", "the call ended before its output, or an operator aborted the request"
    else:
        return
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR, description)
