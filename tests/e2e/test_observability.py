"""The files in deploy/observability with a real Prometheus: its rules, and each query of the dashboard, under load."""

import math
import statistics
import time
from collections.abc import Iterator

import grpc
import pytest

from tests.e2e.observed import MAX_NUM_SEQS, MAX_NUM_WAITING, Answer, Load, Site, grpc_request, observed_site
from tests.e2e.services import Stream
from tests.e2e.waiting import WAIT_S, wait_until
from tests.support.programs import require_programs
from tools.prometheus import Panel, annotations, as_grafana_asks, panels

pytestmark = pytest.mark.slow

NUM_KILLS = 3
NUM_TOKENS = 300
TOLERANCE = 0.1
"""Prometheus extends a rate to the ends of its window, past the first and last scrapes in it."""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    require_programs("prometheus")
    with observed_site() as site:
        yield site


class Window:
    """A time that begins before a load and ends after it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.start = time.time()
        self._wait_scrape()

    def _wait_scrape(self) -> None:
        """A rate is that between scrapes within its window."""
        prometheus, now = self.site.prometheus, time.time()
        wait_until(lambda: (prometheus.value("timestamp(tandem:worker_up)") or 0) > now, "a scrape of the scheduler")

    def end(self, num_output_tokens: int) -> None:
        prometheus = self.site.prometheus
        total = "tandem:request_generation_tokens_sum"
        wait_until(lambda: prometheus.value(total) == num_output_tokens, "Prometheus has all tokens")
        self._wait_scrape()
        self.stop = time.time()

    @property
    def length_s(self) -> float:
        return self.stop - self.start

    def values(self, panel: Panel) -> dict[str, list[float]]:
        """The panel's values by its queries' legends, as Grafana draws them over the window."""
        step_s = 2 * self.site.prometheus.scrape_interval_s
        found: dict[str, list[float]] = {}
        for legend, query in panel.queries.items():
            query = as_grafana_asks(query, 2 * step_s, self.length_s)
            series = self.site.prometheus.query_range(query, self.start, self.stop, step_s)
            found[legend] = [value for _, values in series for _, value in values]
        return found

    def totals(self, panel: Panel) -> dict[str, float]:
        """The sums of the panel's series by legend, each over all of the window at once."""
        totals = {}
        for legend, query in panel.queries.items():
            query = as_grafana_asks(query, self.length_s, self.length_s)
            totals[legend] = sum(value for _, value in self.site.prometheus.query(query, self.stop))
        return totals


def check_is_drawn(panel: Panel, values: dict[str, list[float]]) -> None:
    """Each query has data; where it is a number at all, it is one that can be."""
    for legend, found in values.items():
        numbers = [value for value in found if not math.isnan(value)]
        assert numbers, f"{panel.title}, {legend}: no data"
        assert all(0 <= number < math.inf for number in numbers), f"{panel.title}, {legend}: {numbers}"
        assert panel.maximum is None or max(numbers) <= panel.maximum * (1 + TOLERANCE), (
            f"{panel.title}, {legend}: {max(numbers)}"
        )


def check_counts(window: Window, by_title: dict[str, Panel], answers: list[Answer]) -> None:
    """Rates over the whole load are what its clients counted."""

    def totals(title: str) -> dict[str, float]:
        return {legend: value * window.length_s for legend, value in window.totals(by_title[title]).items()}

    cached = sum(answer.num_cached_tokens for answer in answers)
    prompt = sum(answer.num_prompt_tokens for answer in answers)
    tokens = totals("Tokens")
    assert tokens["output"] == pytest.approx(sum(answer.num_output_tokens for answer in answers), rel=TOLERANCE)
    assert tokens["prompt, cached"] == pytest.approx(cached, rel=TOLERANCE)
    assert tokens["prompt, computed"] == pytest.approx(prompt - cached, rel=TOLERANCE)
    assert totals("Ended choices")["{{finished_reason}}"] == pytest.approx(len(answers), rel=TOLERANCE)
    assert totals("Refused requests") == {"{{reason}}": 0}
    assert window.totals(by_title["Prefix cache hits"])["hits"] == pytest.approx(cached / prompt, rel=TOLERANCE)


def check_latencies(window: Window, by_title: dict[str, Panel], answers: list[Answer]) -> None:
    """Medians are the clients' within the width of a bucket, which is a factor of 3.3 at most."""
    seen = {
        "Time to first token": statistics.median(answer.first_token_s for answer in answers),
        "End-to-end latency": statistics.median(answer.all_s for answer in answers),
        "Inter-token latency": statistics.median(
            (answer.all_s - answer.first_token_s) / (answer.num_output_tokens - 1) for answer in answers
        ),
    }
    for title, median in seen.items():
        found = window.totals(by_title[title])
        assert median / 4 < found["p50"] < median * 4, (title, median, found)
        assert 0 < found["p50"] <= found["p90"] <= found["p99"], (title, found)


def check_losses(window: Window, by_title: dict[str, Panel]) -> None:
    workers = window.totals(by_title["Workers"])
    assert workers["up"] == 1 and workers["losses"] == pytest.approx(NUM_KILLS, rel=TOLERANCE)
    prometheus = window.site.prometheus
    [query] = annotations(prometheus.speed).values()
    assert prometheus.query_range(as_grafana_asks(query), window.start, window.stop, prometheus.scrape_interval_s)
    [recovery_s] = window.totals(by_title["Time to recover"]).values()
    assert 0 < recovery_s < WAIT_S


def test_the_dashboard_shows_what_the_clients_see(site: Site) -> None:
    by_title = {panel.title: panel for panel in panels()}
    window = Window(site)
    load = Load(site)
    load.wait_answers(15)
    wait_until(lambda: not site.prometheus.firing(), "no alert")
    for number in range(NUM_KILLS):
        site.kill_worker()
        wait_until(lambda: site.engine.load().num_worker_losses == number + 1, "the loss is seen")  # noqa: B023
        load.wait_answers(4)
    wait_until(lambda: "TandemWorkerLostOften" in site.prometheus.firing(), "the alert of many losses")
    answers = load.end()
    window.end(sum(answer.num_output_tokens for answer in answers))
    values = {title: window.values(panel) for title, panel in by_title.items()}
    for title, panel in by_title.items():
        check_is_drawn(panel, values[title])
    assert 2 <= max(values["Sequences"]["running"]) <= MAX_NUM_SEQS
    assert max(values["KV cache in use"]["{{instance}}"]) > 0.5 and max(values["Preemptions"]["preemptions"]) > 0
    assert max(values["Plans in flight"]["{{instance}}"]) in (1, 2)
    assert max(values["HTTP requests"]["{{status}}"]) > 0 and max(values["Plan size"]["p99"]) > 10
    check_counts(window, by_title, answers)
    check_latencies(window, by_title, answers)
    check_losses(window, by_title)
    wait_until(lambda: site.prometheus.firing() <= {"TandemWorkerLostOften"}, "the end of other alerts")


def test_a_full_queue_fires_its_alert(site: Site) -> None:
    running = [
        Stream(site.engine.inference.GenerateStream(grpc_request("ROMEO:\n", NUM_TOKENS))) for _ in range(MAX_NUM_SEQS)
    ]
    for stream in running:
        stream.wait_tokens(1)
    calls = []

    def is_firing() -> bool:
        calls.append(site.engine.inference.GenerateStream(grpc_request("JULIET:\n", NUM_TOKENS)))
        time.sleep(site.prometheus.scrape_interval_s / 2)
        return "TandemQueueFull" in site.prometheus.firing()

    wait_until(is_firing, "the alert of a full queue")
    for call in (*calls, *(stream.call for stream in running)):
        call.cancel()
    assert len(calls) > MAX_NUM_WAITING and grpc.StatusCode.RESOURCE_EXHAUSTED in {call.code() for call in calls}
    wait_until(lambda: "TandemQueueFull" not in site.prometheus.firing(), "its end")


def test_a_worker_that_stays_away_fires_alerts(site: Site) -> None:
    site.engine.worker.kill()
    call = site.engine.inference.GenerateStream(grpc_request("ROMEO:\n", NUM_TOKENS))
    expected = {"TandemServiceDown", "TandemWorkerLost", "TandemNoProgress"}
    wait_until(lambda: expected <= site.prometheus.firing(), "the alerts")
    assert all(rule["health"] == "ok" for rule in site.prometheus.rules().values()), site.prometheus.rules()
    site.engine.restart_worker()
    assert sum(len(message.token_ids) for message in call) == NUM_TOKENS
    wait_until(lambda: not expected & site.prometheus.firing(), "their end")
