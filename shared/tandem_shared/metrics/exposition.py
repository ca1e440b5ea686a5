"""Metrics as Prometheus reads them: what a metric is, and its values as text. Needs prometheus_client.

The values are read at once, as plain data, and become text later, in another thread if need be.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from tandem_shared.metrics.histogram import Histogram


@dataclass(frozen=True, slots=True)
class Metric:
    """name: without the prefix, and a counter's without its _total. kind: counter, gauge or histogram."""

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def histogram(self) -> Histogram:
        """An empty histogram with this metric's buckets."""
        return Histogram(self.buckets)


Value: TypeAlias = "float | Histogram"
Sample: TypeAlias = "tuple[Metric, Mapping[tuple[str, ...], Value]]"
"""A metric, and its values by the values of its labels."""


class Samples(Collector):
    """Samples with a prefix, and labels that all of them have."""

    def __init__(self, prefix: str, labels: Mapping[str, str], samples: Iterable[Sample]) -> None:
        self._prefix = prefix
        self._names, self._values = tuple(labels), tuple(labels.values())
        self._samples = list(samples)

    def collect(self) -> Iterator[Family]:
        for metric, values in self._samples:
            name, labels = f"{self._prefix}{metric.name}", (*self._names, *metric.labels)
            if metric.kind == "histogram":
                yield self._histogram(HistogramMetricFamily(name, metric.text, labels=labels), values)
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(name, metric.text, labels=labels)
            for own, value in values.items():
                assert not isinstance(value, Histogram), "a number is needed here"
                family.add_metric((*self._values, *own), value)
            yield family

    def _histogram(self, family: HistogramMetricFamily, values: Mapping[tuple[str, ...], Value]) -> Family:
        for own, value in values.items():
            assert isinstance(value, Histogram), "a histogram is needed here"
            bounds = map(str, [*map(float, value.bounds), "+Inf"])
            buckets = list(zip(bounds, itertools.accumulate(value.counts), strict=True))
            family.add_metric((*self._values, *own), buckets, value.total)
        return family


def encode(collector: Collector, accept: str = "") -> tuple[bytes, str]:
    """A scrape's answer and its content type. accept: the header in which the scraper says what it reads."""
    encoder, content_type = choose_encoder(readable(accept))
    return encoder(collector), content_type


def readable(accept: str) -> str:
    """The header as prometheus_client reads it, or an empty one where it would raise: a version may be no number.

    It is changed so that colons of names stay as they are: where OpenMetrics is asked for without an escaping, some
    releases write `_` for them, but in the text format `:`.
    """
    accept = ",".join(map(_with_colons, accept.split(",")))
    try:
        choose_encoder(accept)
    except (TypeError, ValueError):
        return ""
    return accept


def _with_colons(accepted: str) -> str:
    name, *parameters = (part.strip() for part in accepted.split(";"))
    if name != "application/openmetrics-text":
        return accepted
    parameters = [part for part in parameters if part != "version=" and not part.startswith("escaping=")]
    if not any(part.startswith("version=") for part in parameters):
        parameters.append("version=1.0.0")
    return ";".join([name, *parameters, "escaping=allow-utf-8"])
