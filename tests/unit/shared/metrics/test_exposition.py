"""Histograms and their text, compared with prometheus_client's own histogram and read back with its parser."""

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tandem_shared.metrics.exposition import Metric, Samples, encode
from tandem_shared.metrics.histogram import Histogram

BOUNDS = (0.5, 1.0, 2.5)
VALUES = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 2.0, 2.5, 3.0]), st.integers(0, 3)))


@given(VALUES, VALUES)
def test_a_histogram_is_prometheus_clients(first: list[tuple[float, int]], second: list[tuple[float, int]]) -> None:
    metric = Metric("wait_seconds", "histogram", "How long.", buckets=BOUNDS)
    ours = [metric.histogram(), metric.histogram()]
    registry = prometheus_client.CollectorRegistry()
    theirs = prometheus_client.Histogram("x:wait_seconds", "How long.", ["color"], buckets=BOUNDS, registry=registry)
    theirs.labels("red")
    for histogram, values in zip(ours, (first, second), strict=True):
        for value, count in values:
            histogram.observe(value, count)
            for _ in range(count):
                theirs.labels("red").observe(value)
    copied = ours[0].copy()
    ours[0].add(ours[1])
    assert copied.count == sum(count for _, count in first)
    samples = Samples("x:", {"color": "red"}, [(metric, {(): ours[0]})])
    expected = [
        sample for family in registry.collect() for sample in family.samples if not sample.name.endswith("_created")
    ]
    [family] = text_string_to_metric_families(encode(samples)[0].decode())
    assert [(s.name, s.labels, s.value) for s in family.samples] == [(s.name, s.labels, s.value) for s in expected]


def test_numbers_with_labels_of_their_own() -> None:
    ended = Metric("ended", "counter", "Ends.", ("reason",))
    level = Metric("level", "gauge", 'Says "level".')
    samples = Samples("x:", {"model": 'a"b'}, [(ended, {("stop",): 3, ("length",): 0}), (level, {(): 0.5})])
    text = encode(samples)[0].decode()
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found == {
        ("x:ended_total", 'a"b', "stop"): 3,
        ("x:ended_total", 'a"b', "length"): 0,
        ("x:level", 'a"b'): 0.5,
    }


PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;"
    "q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    "accept",
    [
        PROMETHEUS_2,
        PROMETHEUS_3,
        "application/openmetrics-text",
        "application/openmetrics-text; version=1.0.0",
        "application/openmetrics-text; version=1.0.0; escaping=underscores",
    ],
)
def test_names_keep_their_colons_in_openmetrics(accept: str) -> None:
    level = Metric("level", "gauge", "Says a level.")
    text, content_type = encode(Samples("x:", {"model": "any"}, [(level, {(): 0.5})]), accept)
    assert content_type.startswith("application/openmetrics-text")
    assert text == b'# HELP x:level Says a level.\n# TYPE x:level gauge\nx:level{model="any"} 0.5\n# EOF\n'


def test_histograms_of_different_bounds_are_not_added_up() -> None:
    with pytest.raises(ValueError, match="different bounds"):
        Histogram(BOUNDS).add(Histogram((1.0,)))
