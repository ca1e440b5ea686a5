"""The gateway's spans, and that the scheduler's are below them."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.contract.gated_worker import gated_runner, kill_worker, open_gate
from tests.contract.services import Services
from tests.support.collector import Collector, check_phases, parent_of, running_collector
from tests.support.gateway import HOST, Gateway, head

CHAT = {"messages": [{"role": "user", "content": "Who goes there?"}], "max_tokens": 8}
NUMBERS = itertools.count(1000)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with running_collector() as collector:
        yield collector


@pytest.fixture
async def traced(folder: Path, collector: Collector) -> AsyncIterator[tuple[Services, Gateway]]:
    endpoint = collector.endpoint
    services = Services(
        gated_runner(0, permits=60), tokenizer=str(folder), otlp_traces_endpoint=endpoint, worker_wait_s=0.1
    )
    async with services, Gateway(services.address, otlp_traces_endpoint=endpoint) as gateway:
        yield services, gateway


async def test_a_request_is_one_trace_through_gateway_scheduler_and_worker(
    traced: tuple[Services, Gateway], collector: Collector
) -> None:
    _, gateway = traced
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
    ):
        trace_id, client_id, header = parent_of(next(NUMBERS))
        answer = await gateway.post(path, body, {"traceparent": header, "tracestate": "a=b"})
        assert answer.status == 200
        trace = await asyncio.to_thread(collector.trace, trace_id, "tandem-gateway", "tandem-scheduler")
        outer, inner = trace.server("tandem-gateway"), trace.server()
        assert (outer.name, outer.parent_id) == (f"POST {path}", client_id)
        assert outer.attributes["http.response.status_code"] == 200
        assert inner.parent_id == outer.span_id
        assert outer.start_ns <= inner.start_ns and not (outer.is_error or inner.is_error)
        check_phases(trace)
        assert "Who goes" not in str(trace.spans)


async def test_requests_that_fail(traced: tuple[Services, Gateway], collector: Collector) -> None:
    services, gateway = traced
    trace_id, _, header = parent_of(next(NUMBERS))
    assert (await gateway.post("/v1/chat/completions", {**CHAT, "top_p": 7}, {"traceparent": header})).status == 400
    trace = await asyncio.to_thread(collector.trace, trace_id, "tandem-gateway")
    # The client's mistake is no error of the server.
    [refused] = trace.spans
    assert refused.attributes["http.response.status_code"] == 400 and not refused.is_error

    long = {**CHAT, "max_tokens": 400, "ignore_eos": True}
    for is_stream in (True, False):
        trace_id, _, header = parent_of(next(NUMBERS))
        body = json.dumps({**long, "stream": is_stream}).encode()
        _, writer = await asyncio.open_connection(HOST, gateway.port)
        writer.write(head("POST", "/v1/chat/completions", len(body), {"traceparent": header}) + body)
        open_gate(services.runner, 10)
        await services.wait_load(lambda load: load.num_running_sequences == 1, "it runs")
        writer.close()
        trace = await asyncio.to_thread(collector.trace, trace_id, "tandem-gateway", "tandem-scheduler")
        assert trace.server("tandem-gateway").is_error and trace.server().is_error

    trace_id, _, header = parent_of(next(NUMBERS))
    before = (await services.load()).num_output_tokens
    asked = asyncio.create_task(gateway.post("/v1/chat/completions", {**long, "stream": True}, {"traceparent": header}))
    open_gate(services.runner, 10)
    await services.wait_load(lambda load: load.num_output_tokens > before, "it streams")
    await kill_worker(services)
    answer = await asked
    assert answer.status == 200 and b"no worker came back" in answer.body
    trace = await asyncio.to_thread(collector.trace, trace_id, "tandem-gateway", "tandem-scheduler")
    for span in (trace.server("tandem-gateway"), trace.server()):
        assert span.is_error and "no worker came back" in span.description


async def test_long_urls_make_no_long_spans(traced: tuple[Services, Gateway], collector: Collector) -> None:
    _, gateway = traced
    for path in ("/v1/chat/completions?" + "q" * 30_000, "/" + "p" * 30_000):
        trace_id, _, header = parent_of(next(NUMBERS))
        await gateway.post(path, CHAT, {"traceparent": header})
        trace = await asyncio.to_thread(collector.trace, trace_id, "tandem-gateway")
        for span in trace.spans:
            assert all(len(str(value)) <= 1024 for value in (span.name, *span.attributes.values()))


async def test_a_gateway_without_traces_passes_the_clients_trace_on(folder: Path, collector: Collector) -> None:
    settings = {"tokenizer": str(folder), "otlp_traces_endpoint": collector.endpoint}
    async with Services(**settings) as services, Gateway(services.address) as gateway:
        trace_id, client_id, header = parent_of(next(NUMBERS))
        assert (await gateway.post("/v1/chat/completions", CHAT, {"traceparent": header})).status == 200
        assert (await asyncio.to_thread(collector.trace, trace_id)).server().parent_id == client_id
        # What can't be metadata is not passed on.
        for bad in ("\xe9" * 55, "x" * 5000):
            headers = {"traceparent": header, "tracestate": bad}
            assert (await gateway.post("/v1/chat/completions", CHAT, headers)).status == 200
    assert {span.service for span in collector.spans} == {"tandem-scheduler", "tandem-worker"}
