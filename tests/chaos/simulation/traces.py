"""What must be true of the spans in a simulated world, whatever breaks: each request that was taken has one call, whose
phases follow each other within it, and whose steps lie in its phases.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tandem_scheduler.engine.observer import Event, RequestSubmitted
from tandem_scheduler.observers.metrics import RequestTimes
from tandem_scheduler.observers.traces import RequestTraces

if TYPE_CHECKING:
    from tests.chaos.simulation.world import World

PHASES = ["queue", "prefill", "decode"]


class WatchedTraces:
    """The scheduler's spans, which are kept here."""

    def __init__(self, world: "World", times: Mapping[int, RequestTimes]) -> None:
        self._world = world
        self._exporter = InMemorySpanExporter()
        self._num_submitted = 0
        self._traces = RequestTraces(self, "simulated", times)

    def provider(self, service_name: str, instance_id: str = "") -> TracerProvider:
        """Takes the place of SpanExport's."""
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        return provider

    def tell(self, event: Event) -> None:
        self._num_submitted += isinstance(event, RequestSubmitted)
        try:
            self._traces.tell(event)
        except Exception as error:
            self._world.fail(f"the traces failed at {type(event).__name__}: {error!r}")

    def check_end(self) -> None:
        """Checks the spans of a world that has ended, whose requests are all closed."""
        below: defaultdict[int, list[ReadableSpan]] = defaultdict(list)
        calls = []
        for span in self._exporter.get_finished_spans():
            if span.kind is SpanKind.SERVER:
                calls.append(span)
            else:
                assert span.parent is not None
                below[span.parent.span_id].append(span)
        self._claim(len(calls) == self._num_submitted, f"{len(calls)} calls of {self._num_submitted} have spans")
        self._claim(not self._traces.num_held, f"the traces hold {self._traces.num_held} sequences")
        for call in calls:
            self._check(call, below)
        scheduler = self._world.step_loop.scheduler
        assert scheduler is not None
        num_preempted = sum(event.name == "preempted" for call in calls for event in call.events)
        # Some of the preempted ones never had a row again.
        true = scheduler.load().num_preemptions
        self._claim(num_preempted <= true, f"the traces have {num_preempted} preemptions of {true}")

    def _check(self, call: ReadableSpan, below: Mapping[int, list[ReadableSpan]]) -> None:
        phases = _sorted(below[_id(call)])
        names = [phase.name for phase in phases]
        self._claim(names == PHASES[: len(names)] and bool(names), f"a call has the phases {names}")
        for before, after in itertools.pairwise(phases):
            self._claim(before.end_time == after.start_time, f"{before.name} and {after.name} do not meet")
        self._claim(all(_is_within(phase, call) for phase in phases), "a phase is not within its call")
        self._claim(
            all(_is_within(step, phase) for phase in phases for step in below.get(_id(phase), ())),
            "a step is not within its phase",
        )
        # The first token comes of a step. A call that fails at its first token ends before the step is told.
        is_whole = call.status.status_code is not StatusCode.ERROR
        self._claim(not is_whole or bool(below.get(_id(phases[1]))), "a prefill has no step")
        assert call.attributes is not None
        if call.attributes["gen_ai.request.n"] == 1:
            initials = "".join(event.name[0] for event in call.events)
            self._claim(re.fullmatch("([pw]r)*w?", initials) is not None, f"a call has the events {initials}")
        start, end = _times(call)
        self._claim(all(start <= event.timestamp <= end for event in call.events), "an event is not within its call")

    def _claim(self, is_true: bool, what: str) -> None:
        if not is_true:
            self._world.fail(what)


def _id(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def _times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None and span.end_time is not None
    return span.start_time, span.end_time


def _sorted(spans: list[ReadableSpan]) -> list[ReadableSpan]:
    # Phases may take no time at all.
    return sorted(spans, key=lambda span: (*_times(span), PHASES.index(span.name)))


def _is_within(inner: ReadableSpan, outer: ReadableSpan) -> bool:
    return _times(outer)[0] <= _times(inner)[0] <= _times(inner)[1] <= _times(outer)[1]
