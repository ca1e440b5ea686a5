"""A collector of traces: a server of OTLP over gRPC, which decodes what services send it."""

import contextlib
import itertools
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.e2e.waiting import wait_until

SERVER = trace_pb2.Span.SPAN_KIND_SERVER
INTERNAL = trace_pb2.Span.SPAN_KIND_INTERNAL


@dataclass(frozen=True)
class Event:
    name: str
    at_ns: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """A span as it came. Ids are hexadecimal, times nanoseconds of Unix time."""

    service: str
    instance: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[Event]
    is_error: bool
    description: str

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True)
class Trace:
    spans: list[Span]

    def server(self, service: str = "tandem-scheduler") -> Span:
        """The one call that the service served."""
        [span] = [span for span in self.spans if span.service == service and span.kind == SERVER]
        return span

    def below(self, parent: Span) -> list[Span]:
        """A span's children, by the times of their starts."""
        children = [span for span in self.spans if span.parent_id == parent.span_id]
        return sorted(children, key=lambda span: (span.start_ns, span.end_ns))

    def phases(self) -> list[str]:
        return [span.name for span in self.below(self.server())]


def parent_of(number: int, is_sampled: bool = True) -> tuple[str, str, str]:
    """A client's span: the trace's id, its own id, and the header that says both."""
    trace_id, span_id = f"{number:032x}", f"{number + 7:016x}"
    return trace_id, span_id, f"00-{trace_id}-{span_id}-0{int(is_sampled)}"


def check_phases(trace: Trace) -> None:
    """Queue, prefill and decode follow each other, within their call, and the steps lie in their phases."""
    server = trace.server()
    phases = trace.below(server)
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    assert server.start_ns <= phases[0].start_ns and phases[-1].end_ns <= server.end_ns
    for earlier, later in itertools.pairwise(phases):
        assert earlier.end_ns == later.start_ns
    for phase in phases:
        assert (phase.service, phase.kind) == (server.service, INTERNAL)
        for step in trace.below(phase):
            assert (step.service, step.name) == ("tandem-worker", "step")
            assert phase.start_ns <= step.start_ns <= step.end_ns <= phase.end_ns
    names = ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")
    for name, phase in zip(names, phases, strict=True):
        # Both were rounded to nanoseconds of different origins.
        assert abs(server.attributes[f"gen_ai.latency.{name}"] * 1e9 - phase.duration_ns) < 1000


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.endpoint = ""

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.spans += [
            _span(_attributes(resource.resource.attributes), span)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str, *services: str) -> "Trace":
        """Waits until each of these services, by default the scheduler, has sent the server span of a call."""
        for service in services or ("tandem-scheduler",):
            wait_until(
                lambda service=service: any(  # type: ignore[misc]
                    (span.trace_id, span.service, span.kind) == (trace_id, service, SERVER) for span in self.spans
                ),
                f"a span of {service}",
            )
        return Trace([span for span in self.spans if span.trace_id == trace_id])


@contextlib.contextmanager
def running_collector() -> Iterator[Collector]:
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()


def _span(resource: dict[str, Any], span: trace_pb2.Span) -> Span:
    return Span(
        resource["service.name"],
        resource.get("service.instance.id", ""),
        span.name,
        span.kind,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _attributes(span.attributes),
        [Event(event.name, event.time_unix_nano, _attributes(event.attributes)) for event in span.events],
        span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        span.status.message,
    )


def _attributes(pairs: "Any") -> dict[str, Any]:
    attributes: list[KeyValue] = list(pairs)
    return {each.key: _value(each.value) for each in attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    assert kind is not None
    found = getattr(value, kind)
    return [_value(each) for each in found.values] if kind == "array_value" else found
