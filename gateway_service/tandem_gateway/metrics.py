"""What the gateway measures of HTTP, beside the scheduler's metrics, which it passes on.

With several processes the values are in files that all of them write, so that whichever process is asked has the sum,
also of those that have ended.
"""

import os
import time
from typing import TYPE_CHECKING

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Receive, Scope, Send

from tandem_gateway.errors import ClientGone
from tandem_shared.errors import RetryLater
from tandem_shared.metrics.exposition import Metric, Samples, encode

if TYPE_CHECKING:
    from tandem_gateway.engine import Engine, Metadata

FILES_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""The variable by which prometheus_client knows the folder of the files. It must be set before that is imported."""

METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST"})

REQUESTS = Metric(
    "http_requests",
    "counter",
    "HTTP requests that were answered, by route, method and class of status.",
    ("handler", "method", "status"),
)
DURATIONS = Metric(
    "http_request_duration_seconds",
    "histogram",
    "From a request's head to the end of its answer, of a stream too.",
    ("handler", "method"),
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0),
)
UP = Metric("http_scheduler_up", "gauge", "1 if the scheduler gave its metrics for this scrape, else 0.")
GATEWAY_METRICS = (REQUESTS, DURATIONS, UP)


class HttpMetrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(REQUESTS.name, REQUESTS.text, REQUESTS.labels, registry=self._registry)
        self._durations = Histogram(
            DURATIONS.name, DURATIONS.text, DURATIONS.labels, buckets=DURATIONS.buckets, registry=self._registry
        )

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """Counts a request that has been answered. Labels are few, whatever a client sends."""
        handler = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._durations.labels(handler, method).observe(seconds)

    async def text(self, engine: "Engine", metadata: "Metadata") -> bytes:
        """The scheduler's metrics and the gateway's. Raises what the scheduler refuses the caller with. If there is no
        scheduler, the gateway's alone.
        """
        try:
            schedulers = await engine.metrics(metadata)
        except (RetryLater, grpc.aio.AioRpcError) as error:
            if isinstance(error, grpc.aio.AioRpcError) and error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            schedulers = None
        up, _ = encode(Samples("", {}, [(UP, {(): schedulers is not None})]))
        return (schedulers or b"") + up + generate_latest(self._values())

    def _values(self) -> CollectorRegistry:
        if FILES_VARIABLE not in os.environ:
            return self._registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry


class CountedRequests:
    """The outermost of our middleware, as a request counts with whatever status it ends."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        try:
            await self._app(scope, receive, send)
            # BoundedRequests notes it, as it sees all messages anyway.
            status = scope["state"].get("status", 500)
        except ClientGone:
            status = 499
            raise
        finally:
            self._metrics.count(scope, status, time.monotonic() - started)
