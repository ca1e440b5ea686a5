"""The scheduler's spans, as a collector gets them, and that no collector can harm a request."""

import asyncio
import gc
import itertools
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from tandem import AsyncTandemClient, SamplingParams, TandemClient
from tandem.v1 import control_pb2, inference_pb2
from tandem_scheduler.observers.traces import _Call
from tests.contract.front_ends import two_front_ends
from tests.contract.gated_worker import gated_runner, kill_worker, open_gate
from tests.contract.services import HOST, Services, error_of, model_info, read_stream, stream_request
from tests.support.collector import Collector, Trace, check_phases, parent_of, running_collector
from tests.support.fake_worker import FakeRunner

NUMBERS = itertools.count(1)
"""The numbers of traces. No two tests share one."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with running_collector() as collector:
        yield collector
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, _Call)], "calls that have ended are kept"


async def trace_of(collector: Collector, trace_id: str) -> Trace:
    return await asyncio.to_thread(collector.trace, trace_id)


def start(services: Any, request: inference_pb2.GenerateStreamRequest) -> tuple[str, Any]:
    """Starts a stream below a client's span. Gives the trace's id and the call."""
    trace_id, _, header = parent_of(next(NUMBERS))
    return trace_id, services.inference.GenerateStream(request, metadata=(("traceparent", header),))


async def test_a_call_has_its_phases_below_the_clients_span(collector: Collector) -> None:
    async with Services(otlp_traces_endpoint=collector.endpoint) as services:
        trace_id, client_id, header = parent_of(next(NUMBERS))
        metadata = (("traceparent", header), ("tracestate", "vendor=1"))
        request = stream_request("To be, or not to be", 12, request_id="the-one", num_choices=2, temperature=0.5)
        output = await read_stream(services.inference.GenerateStream(request, metadata=metadata))
        trace = await trace_of(collector, trace_id)
    server = trace.server()
    assert (server.parent_id, server.name) == (client_id, "tandem.v1.InferenceService/GenerateStream")
    assert server.attributes["rpc.method"] == server.name
    assert not server.is_error and not server.events
    check_phases(trace)
    [_, prefill, _] = trace.below(server)
    steps = trace.below(prefill)
    assert {step.instance for step in steps} == {"worker-1"}
    assert sum(step.attributes["tandem.step.num_request_tokens"] for step in steps) >= output.usage.num_prompt_tokens
    usage = output.usage
    expected = {
        "gen_ai.request.id": "the-one",
        "gen_ai.request.model": "embedded",
        "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 12,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": usage.num_prompt_tokens,
        "gen_ai.usage.prompt_tokens": usage.num_prompt_tokens,
        "gen_ai.usage.output_tokens": usage.num_output_tokens,
        "gen_ai.usage.completion_tokens": usage.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.num_cached_tokens,
    }
    assert expected.items() <= server.attributes.items()
    latencies = {name: server.attributes[f"gen_ai.latency.{name}"] for name in ("time_to_first_token", "e2e")}
    assert 0 < latencies["time_to_first_token"] < latencies["e2e"] <= server.duration_ns / 1e9
    assert "To be" not in str(trace.spans)


async def test_who_decides_what_is_sampled(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    async with Services(otlp_traces_endpoint=collector.endpoint) as services:
        # A call without a parent is what the sampler makes of it; otherwise the parent has decided.
        for header in ("", "no header of W3C's", "00" * 1000, parent_of(next(NUMBERS), is_sampled=False)[2]):
            metadata = (("traceparent", header),)
            await read_stream(services.inference.GenerateStream(stream_request(), metadata=metadata))
        trace_id, call = start(services, stream_request())
        await read_stream(call)
        trace = await trace_of(collector, trace_id)
    assert trace.spans == collector.spans


async def test_a_call_without_a_parent_begins_a_trace(collector: Collector) -> None:
    async with Services(otlp_traces_endpoint=collector.endpoint) as services:
        await services.generate(stream_request())
    # The services have sent their last spans by now.
    [server] = [span for span in collector.spans if span.name == "tandem.v1.InferenceService/Generate"]
    assert server.parent_id == "" and {span.trace_id for span in collector.spans} == {server.trace_id}


async def test_errors_and_cancelled_calls_have_the_status_of_errors(collector: Collector) -> None:
    settings = {"otlp_traces_endpoint": collector.endpoint, "max_num_seqs": 2, "worker_wait_s": 0.1}
    async with Services(gated_runner(0), **settings) as services:
        aborted_id, aborted = start(services, stream_request(request_id="aborted", max_tokens=100))
        lost_id, lost = start(services, stream_request(max_tokens=100))
        await services.wait_load(
            lambda load: load.num_running_sequences + load.num_waiting_sequences == 2, "both are there"
        )
        open_gate(services.runner, 10)
        await services.wait_load(lambda load: load.num_running_sequences == 2, "both run")
        waiting_id, waiting = start(services, stream_request())
        await services.wait_load(lambda load: load.num_waiting_sequences == 1, "it waits")
        waiting.cancel()
        trace = await trace_of(collector, waiting_id)
        assert trace.phases() == ["queue"] and trace.server().is_error
        assert trace.server().attributes["error.type"] == "ABORTED"
        await services.control.Abort(control_pb2.AbortRequest(request_id="aborted"))
        await read_stream(aborted)
        trace = await trace_of(collector, aborted_id)
        assert trace.phases()[:2] == ["queue", "prefill"]
        assert trace.server().attributes["error.type"] == "ABORTED"
        await kill_worker(services)
        await error_of(read_stream(lost))
        server = (await trace_of(collector, lost_id)).server()
        assert server.is_error and "no worker came back" in server.description
        assert server.attributes["error.type"] == "WORKER_UNAVAILABLE"
        assert server.attributes["gen_ai.response.finish_reasons"] == ["error"]


async def test_preemptions_are_events_and_what_is_computed_again_is_a_step(collector: Collector) -> None:
    runner = FakeRunner(model_info(num_blocks=24, block_size=4))
    async with Services(runner, otlp_traces_endpoint=collector.endpoint) as services:
        calls = [start(services, stream_request(range(1, 20), 40, seed=seed)) for seed in range(6)]
        await asyncio.gather(*(read_stream(call) for _, call in calls))
        traces = [await trace_of(collector, trace_id) for trace_id, _ in calls]
        num_preemptions = (await services.load()).num_preemptions
    assert num_preemptions > 0
    num_seen = 0
    for trace in traces:
        check_phases(trace)
        server = trace.server()
        names = [event.name for event in server.events]
        assert names == ["preempted", "resumed"] * (len(names) // 2)
        times = [event.at_ns for event in server.events]
        assert times == sorted(times) and all(server.start_ns <= at <= server.end_ns for at in times)
        [_, _, decode] = trace.below(server)
        assert bool(names) == bool(trace.below(decode))
        num_seen += names.count("preempted")
    assert num_seen == num_preemptions


async def test_a_lost_worker_is_an_event_of_the_calls_that_it_ran(collector: Collector) -> None:
    async with Services(gated_runner(0, permits=4), otlp_traces_endpoint=collector.endpoint) as services:
        trace_id, call = start(services, stream_request(max_tokens=20, num_choices=2))
        await services.wait_load(lambda load: load.num_step_results == 4, "it is mid-way")
        await kill_worker(services)
        await services.start_worker(gated_runner(1, permits=100_000))
        await read_stream(call)
        trace = await trace_of(collector, trace_id)
    check_phases(trace)
    server = trace.server()
    assert not server.is_error
    names = [event.name for event in server.events]
    assert names == ["worker lost", "resumed", "resumed"]
    instances = [step.instance for phase in trace.below(server) for step in trace.below(phase)]
    assert set(instances) == {"worker-0", "worker-1"}


async def test_front_end_processes_pass_traces_on_and_one_that_dies_ends_its_calls(collector: Collector) -> None:
    services = Services(api_server_count=2, otlp_traces_endpoint=collector.endpoint)
    async with two_front_ends(services) as connections:
        calls = [start(connection, stream_request()) for connection in connections]
        await asyncio.gather(*(read_stream(call) for _, call in calls))
        for trace_id, _ in calls:
            trace = await trace_of(collector, trace_id)
            check_phases(trace)
            assert trace.server().parent_id and not trace.server().is_error
        assert isinstance(services.runner, FakeRunner)
        trace_id, call = start(connections[0], stream_request(max_tokens=2000))
        await services.wait_load(lambda load: load.num_running_sequences == 1, "it runs")
        connections[0].process.kill()
        await error_of(read_stream(call))
        server = (await trace_of(collector, trace_id)).server()
        assert server.is_error and server.attributes["error.type"] == "FRONT_END_LOST"


async def test_the_python_clients_pass_on_the_programs_span(collector: Collector) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("a program")
    params = SamplingParams(max_tokens=3)
    async with Services(otlp_traces_endpoint=collector.endpoint) as services:
        with tracer.start_as_current_span("work") as span:
            async with AsyncTandemClient(services.address) as client:
                await client.generate("a", params)
            context = span.get_span_context()
        trace = await trace_of(collector, f"{context.trace_id:032x}")
        assert trace.server().parent_id == f"{context.span_id:016x}"

        def stream_in_a_span() -> str:
            with tracer.start_as_current_span("work") as span, TandemClient(services.address) as client:
                assert list(client.generate_stream("a", params))
                # What the program says itself wins.
                header = parent_of(4711)[2]
                client.generate("a", params, metadata=(("traceparent", header),))
                return f"{span.get_span_context().trace_id:032x}"

        trace_id = await asyncio.to_thread(stream_in_a_span)
        assert (await trace_of(collector, trace_id)).server().name.endswith("/GenerateStream")
        assert (await trace_of(collector, parent_of(4711)[0])).server().name.endswith("/Generate")


@pytest.mark.parametrize("is_silent", [True, False])
async def test_a_dead_collector_harms_no_request(is_silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and says nothing, or nobody listens there."""
    for name, value in (("SCHEDULE_DELAY", 10), ("MAX_QUEUE_SIZE", 8), ("MAX_EXPORT_BATCH_SIZE", 4)):
        monkeypatch.setenv(f"OTEL_BSP_{name}", str(value))
    listener = socket.create_server((HOST, 0))
    endpoint = f"http://{HOST}:{listener.getsockname()[1]}"
    if not is_silent:
        listener.close()
    with listener:
        async with Services(otlp_traces_endpoint=endpoint) as services:
            outputs = await asyncio.gather(*(services.stream(stream_request(seed=seed)) for seed in range(30)))
            assert all(output.usage.num_output_tokens == 8 for output in outputs)
