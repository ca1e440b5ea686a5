"""The gateway's metrics, compared with what its clients have asked, and the scheduler's, which it passes on."""

import time

from prometheus_client.parser import text_string_to_metric_families

from tests.contract.services import Services, wait_until
from tests.support.gateway import Gateway
from tests.support.metrics import Scrape

BODY = {"prompt": [1, 2, 3], "max_tokens": 6, "ignore_eos": True}


async def scrape_both(gateway: Gateway) -> tuple[Scrape, Scrape]:
    """The gateway's own metrics, and the scheduler's."""
    answer = await gateway.get("/metrics")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.body.decode()
    names = [family.name for family in text_string_to_metric_families(text)]
    assert len(set(names)) == len(names), "a metric is there twice"
    return Scrape(text, prefix=""), Scrape(text)


async def test_requests_are_counted_by_route_and_status(gateway: Gateway, services: Services) -> None:
    started = time.monotonic()
    for stream in (False, True, True):
        assert (await gateway.post("/v1/completions", {**BODY, "stream": stream})).status == 200
    assert (await gateway.post("/v1/completions", {**BODY, "model": "other"})).status == 404
    for path in ("/v1/models", "/v1/models/other", "/nothing/here", "/nor/there"):
        await gateway.get(path)
    took_s = time.monotonic() - started
    own, schedulers = await scrape_both(gateway)
    counted = {
        (s.labels["handler"], s.labels["method"], s.labels["status"]): s.value
        for s in own.families["http_requests"].samples
        if s.name.endswith("_total")
    }
    assert counted == {
        ("/v1/completions", "POST", "2xx"): 3,
        ("/v1/completions", "POST", "4xx"): 1,
        ("/v1/models", "GET", "2xx"): 1,
        ("/v1/models/{name:path}", "GET", "4xx"): 1,
        ("none", "GET", "4xx"): 2,
    }
    assert own["http_request_duration_seconds_count"] == 8
    assert 0 < own["http_request_duration_seconds_sum"] < took_s
    assert own["http_scheduler_up"] == 1
    assert schedulers["request_generation_tokens_sum"] == 3 * 6 and schedulers["worker_up"] == 1
    assert schedulers.counts("requests_refused_total", "reason") == {"INVALID_REQUEST": 1}


async def test_without_a_scheduler_the_gateways_metrics_are_there(gateway: Gateway, services: Services) -> None:
    await gateway.post("/v1/completions", BODY)
    await services.service.stop(0)

    async def is_gone() -> bool:
        own, schedulers = await scrape_both(gateway)
        assert own.values("http_requests_total", "handler")["/v1/completions"] == 1
        return own["http_scheduler_up"] == 0 and "worker_up" not in schedulers

    await wait_until(is_gone, "the scheduler is seen as gone")
