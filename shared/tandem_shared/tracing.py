"""Where the spans of a process go: through a queue and a thread to an OpenTelemetry collector, by OTLP over gRPC.

OpenTelemetry's SDK is imported only once a SpanExport is made. Its OTEL_* variables hold, such as those of the sampler,
the exporter's headers and certificates, and the queue; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over what a
process says of itself.
"""

import logging
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tandem_shared import VERSION
from tandem_shared.errors import ConfigError
from tandem_shared.extras import require_extra

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

TRACE_HEADERS = ("traceparent", "tracestate")
"""W3C's headers of a trace, and the metadata that carries them over gRPC."""

MAX_TRACE_HEADER = 512
"""The longest of them that is passed on, in characters: what W3C asks for."""

MAX_ATTRIBUTE = 1024
"""The longest text of a span's attribute, in characters, unless OpenTelemetry's variables say otherwise. Clients choose
some, such as the URL, and a collector refuses a batch of spans that is too large as a whole."""

CLOSE_TIMEOUT_S = 2.0
"""How long a process that ends tries to send its last spans."""


def check_traces(endpoint: str) -> None:
    """Raises ConfigError if traces are asked for and can't be had."""
    if not endpoint:
        return
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"--otlp-traces-endpoint must be a URL such as http://127.0.0.1:4317, is {endpoint!r}")
    require_extra("otel")


def is_trace_header(value: str) -> bool:
    """Whether a value of TRACE_HEADERS may be passed on. What it means is for OpenTelemetry to say."""
    return len(value) <= MAX_TRACE_HEADER and value.isascii() and value.isprintable()


class SpanExport:
    """Takes spans without waiting. What its queue can't hold is dropped, and what the collector does not take is lost:
    neither ever harms a request.
    """

    def __init__(self, endpoint: str) -> None:
        """endpoint: the collector's URL. http is without TLS, https with it. Raises ConfigError, also for variables of
        OpenTelemetry's that it can't take.
        """
        check_traces(endpoint)
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        try:
            self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
        except Exception as error:
            raise ConfigError(f"OpenTelemetry can't send traces: {error}") from error
        # They warn of headers that clients send, and repeat them, before it is known who the client is.
        for name in ("opentelemetry.trace", "opentelemetry.baggage", "opentelemetry.attributes"):
            logging.getLogger(name).setLevel(logging.ERROR)

    def provider(self, service_name: str, instance_id: str = "") -> "TracerProvider":
        """Makes the spans of a service, of one instance of it if that is given."""
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider

        attributes = {"service.name": service_name, "service.version": VERSION}
        if instance_id:
            attributes["service.instance.id"] = instance_id
        resource = Resource.create(attributes).merge(OTELResourceDetector().detect())
        limits = SpanLimits()
        if limits.max_attribute_length is None:
            limits = SpanLimits(max_attribute_length=MAX_ATTRIBUTE)
        provider = TracerProvider(resource=resource, shutdown_on_exit=False, span_limits=limits)
        provider.add_span_processor(self._processor)
        return provider

    def close(self) -> None:
        """Sends what is left, for CLOSE_TIMEOUT_S at most."""
        closing = threading.Thread(target=self._processor.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)
