"""The gateway's spans, which FastAPI makes, and how the scheduler's join them."""

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from tandem_shared.tracing import TRACE_HEADERS, SpanExport, is_trace_header


def telemetry_of(traces: SpanExport | None) -> TelemetryConfig:
    """A span for each POST, if there are traces, and nothing else of what FastAPI could tell."""
    config: TelemetryConfig = {
        "tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False,
    }  # fmt: skip
    if traces is not None:
        config["tracing"] = True
        config["tracer_provider"] = traces.provider("tandem-gateway")
        config["exclude"] = lambda scope: scope.get("method") != "POST"
    return config


def trace_metadata(headers: Headers) -> tuple[tuple[str, str], ...]:
    """The parent of the scheduler's spans: the request's own span or, without traces here, the client's."""
    found: dict[str, str] = {}
    if trace.get_current_span().get_span_context().is_valid:
        TraceContextTextMapPropagator().inject(found)
    else:
        found = {name: headers.get(name, "") for name in TRACE_HEADERS}
    return tuple((name, value) for name, value in found.items() if value and is_trace_header(value))


def note_error(message: str, status: int) -> None:
    """Tells the request's span of an error that its status does not tell of: after it was sent, or below 500."""
    span = trace.get_current_span()
    span.set_attribute("error.type", str(status))
    span.set_status(trace.StatusCode.ERROR, message)
