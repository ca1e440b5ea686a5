"""The scheduler's metrics, compared with what its clients have counted and timed."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from tandem.v1 import control_pb2, inference_pb2
from tandem_scheduler.observers.definitions import SCHEDULER_METRICS
from tests.contract.front_ends import connections_to_each, running_on, two_front_ends
from tests.contract.gated_worker import gated_runner, kill_worker, open_gate
from tests.contract.services import (
    INFERENCE,
    Services,
    StreamedOutput,
    error_of,
    model_info,
    stream_request,
    wait_until,
)
from tests.support.fake_worker import FakeRunner
from tests.support.metrics import Scrape, scrape


@dataclass
class Client:
    """Streams requests and keeps its own books of them."""

    services: Services
    num_choices: int = 0
    num_tokens: list[int] = field(default_factory=list)
    """Of each choice."""
    num_prompt_tokens: int = 0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    reasons: list[str] = field(default_factory=list)

    async def stream(self, request: inference_pb2.GenerateStreamRequest) -> StreamedOutput:
        started, first = time.monotonic(), None
        output = StreamedOutput()
        async for message in self.services.inference.GenerateStream(request):
            first = first or time.monotonic()
            output.add(message)
        self.ttft_s += (first or started) - started
        self.e2e_s += time.monotonic() - started
        self.num_prompt_tokens += output.usage.num_prompt_tokens
        for choice in output.choices.values():
            self.num_tokens.append(len(choice.token_ids))
            assert choice.finish is not None
            name = inference_pb2.FinishReason.Name(choice.finish.reason)
            self.reasons.append(name.removeprefix("FINISH_REASON_").lower())
        return output


async def settled(services: Services, num_requests: int, num_gaps: int | None = None) -> Scrape:
    """The metrics once so many requests have been closed, and the front ends have told of so many gaps."""
    port = services.service.metrics_port
    assert port is not None
    found = await scrape(port)

    async def is_settled() -> bool:
        nonlocal found
        found = await scrape(port)
        has_gaps = num_gaps is None or found["inter_token_latency_seconds_count"] >= num_gaps
        return has_gaps and found["request_params_n_count"] >= num_requests and found["plans_in_flight"] == 0

    await wait_until(is_settled, f"{num_requests} requests are closed")
    return found


def check_against(found: Scrape, client: Client, num_requests: int) -> None:
    """Compares counts with those of a client whose requests all have ended."""
    num_choices, num_tokens = len(client.num_tokens), sum(client.num_tokens)
    by_reason = found.values("request_success_total", "finished_reason")
    assert by_reason == {reason: client.reasons.count(reason) for reason in ("stop", "length", "abort", "error")}
    assert sum(by_reason.values()) == found["request_params_n_sum"] == num_choices
    assert found["request_generation_tokens_sum"] == num_tokens
    assert found["request_generation_tokens_count"] == num_choices
    assert found["request_prompt_tokens_sum"] == client.num_prompt_tokens
    assert found["inter_token_latency_seconds_count"] == num_tokens - num_choices
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert found[f"{name}_seconds_count"] == num_requests
    # The server's times lie within the client's.
    assert 0 < found["time_to_first_token_seconds_sum"] < client.ttft_s
    assert found["time_to_first_token_seconds_sum"] < found["e2e_request_latency_seconds_sum"] < client.e2e_s
    phases = found["request_prefill_time_seconds_sum"] + found["request_decode_time_seconds_sum"]
    assert phases == pytest.approx(found["request_inference_time_seconds_sum"])
    assert phases + found["request_queue_time_seconds_sum"] < found["e2e_request_latency_seconds_sum"]
    assert 0 <= found["prefix_cache_hits_total"] <= found["prefix_cache_queries_total"]


def check_steps(found: Scrape, load: control_pb2.GetLoadResponse) -> None:
    """Compares what is counted of steps with the load that the control service tells."""
    assert found["steps_total"] == found["iteration_tokens_total_count"] == found["plan_bytes_count"] == load.num_steps
    assert found["step_time_seconds_count"] == found["wire_time_seconds_count"] == load.num_step_results
    assert found["step_time_seconds_sum"] == pytest.approx(load.step_time_ns / 1e9)
    assert found["num_preemptions_total"] == load.num_preemptions
    assert found["num_requests_running"] == found["num_requests_waiting"] == found["kv_cache_usage_perc"] == 0
    blocks = {"free": load.num_free_blocks, "cached": load.num_cached_blocks, "used": load.num_used_blocks}
    assert found.values("kv_blocks", "state") == blocks


def mixed_requests(count: int) -> list[inference_pb2.GenerateStreamRequest]:
    """Requests of several lengths, of which some share prompts, have several choices, or a stop string."""
    requests = []
    for index in range(count):
        prompt = range(1, 20 + 5 * (index // 2))
        requests.append(stream_request(prompt, 10 + 3 * index, seed=index, num_choices=1 + index % 3))
    return requests


async def test_the_metrics_are_what_clients_counted_with_preemptions_and_shared_prefixes() -> None:
    runner = FakeRunner(model_info(num_blocks=24, block_size=4))
    async with Services(runner, metrics_port=0) as services:
        client, requests = Client(services), mixed_requests(9)
        await asyncio.gather(*map(client.stream, requests))
        text = (await client.stream(requests[0])).choices[0].text
        await client.stream(stream_request(range(1, 20), 10, seed=0, stop_strings=[text[2:5]]))
        found = await settled(services, 11)
        check_steps(found, await services.load())
    assert found["num_preemptions_total"] > 0 and found["prefix_cache_hits_total"] > 0
    assert client.reasons.count("stop") == 1
    check_against(found, client, 11)
    # What was computed past the stop was generated too.
    assert found["generation_tokens_total"] >= found["request_generation_tokens_sum"]


async def test_the_metrics_of_front_end_processes_add_up() -> None:
    services = Services(api_server_count=2, metrics_port=0)
    async with two_front_ends(services) as connections:
        clients = [Client(services), Client(services)]
        for client, connection in zip(clients, connections, strict=True):
            client.services = connection  # type: ignore[assignment]
        refused = stream_request(temperature=-1.0)
        for connection in connections:
            await error_of(connection.stream(refused))
        await asyncio.gather(*(client.stream(request) for client in clients for request in mixed_requests(5)))
        both = Client(services)
        for client in clients:
            both.num_tokens += client.num_tokens
            both.reasons += client.reasons
            both.num_prompt_tokens += client.num_prompt_tokens
            both.ttft_s += client.ttft_s
            both.e2e_s += client.e2e_s
        found = await settled(services, 10, sum(both.num_tokens) - len(both.num_tokens))
        check_against(found, both, 10)
        check_steps(found, await services.load())
        # Both front ends tell once a second.
        port = services.service.metrics_port
        assert port is not None

        async def has_refusals() -> bool:
            return (await scrape(port)).counts("requests_refused_total", "reason") == {"INVALID_REQUEST": 2}

        await wait_until(has_refusals, "both refusals")
        # The metrics by RPC, whichever front end is asked, are those of the port.
        for connection in connections:
            reply = await connection.control.GetMetrics(control_pb2.GetMetricsRequest())
            assert Scrape(reply.text.decode()).counted() == {
                key: value for key, value in (await scrape(port)).counted().items() if not key[0].startswith("process")
            }


async def test_requests_of_a_killed_front_end_end_in_the_books() -> None:
    services = Services(gated_runner(0), api_server_count=2, metrics_port=0)
    async with services, connections_to_each(services.address) as (one, other):
        async with running_on(services, one, stream_request(max_tokens=50, num_choices=2)) as lost:
            one.process.kill()
            assert isinstance(await error_of(lost), grpc.aio.AioRpcError)
            assert services.service.metrics_port is not None
            await settled_aborts(services.service.metrics_port, 2)
            open_gate(services.runner)
            await other.stream(stream_request())
        found = await settled(services, 2)
        assert found.values("request_success_total", "finished_reason")["length"] == 1
        assert found["request_params_n_sum"] == 3


async def test_refused_and_cancelled_requests() -> None:
    services = Services(gated_runner(0), metrics_port=0, max_num_seqs=1, max_num_waiting=1)
    async with services:
        port = services.service.metrics_port
        assert port is not None
        running = services.inference.GenerateStream(stream_request(max_tokens=30))
        await services.wait_load(lambda load: load.num_running_sequences == 1, "it runs")
        waiting = services.inference.GenerateStream(stream_request(max_tokens=30))
        await services.wait_load(lambda load: load.num_waiting_sequences == 1, "it waits")
        found = await scrape(port)
        assert (found["num_requests_running"], found["num_requests_waiting"]) == (1, 1)
        assert found["kv_cache_usage_perc"] == pytest.approx(1 / (model_info().num_blocks - 1))
        await error_of(services.stream(stream_request()))
        await error_of(services.stream(stream_request(top_p=7.0)))
        # This one is refused before it is a request.
        garbage = services.channel.unary_unary(f"/{INFERENCE}/Generate", lambda data: data)
        await error_of(garbage(b"\xff"))
        # This one is no request.
        await error_of(services.channel.unary_unary(f"/{INFERENCE}/Tokenize", lambda data: data)(b"\xff"))
        waiting.cancel()
        found = await settled_aborts(port, 1)
        # It was never admitted.
        assert found["request_prefill_kv_computed_tokens_count"] == 0
        assert found["prefix_cache_queries_total"] == 3 and found["request_queue_time_seconds_count"] == 1
        running.cancel()
        found = await settled_aborts(port, 2)
        open_gate(services.runner)
        draining = asyncio.create_task(services.drain())
        await draining
        await error_of(services.stream(stream_request()))
        found = await scrape(port)
    assert found["draining"] == 1
    expected = {"QUEUE_FULL": 1, "INVALID_REQUEST": 2, "DRAINING": 1}
    assert found.counts("requests_refused_total", "reason") == expected


async def test_calls_that_show_no_key_are_refused_and_the_metrics_need_one_for_control(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"ops inference,control {'k' * 20}\nuser inference {'u' * 20}\n")
    (tmp_path / "keys").chmod(0o600)
    async with Services(api_key_file=str(tmp_path / "keys"), metrics_port=0) as services:
        assert (await error_of(services.stream(stream_request()))).code() == grpc.StatusCode.UNAUTHENTICATED
        ask = services.control.GetMetrics
        for key, is_allowed in (("u" * 20, False), ("k" * 20, True)):
            call = ask(control_pb2.GetMetricsRequest(), metadata=(("authorization", f"Bearer {key}"),))
            if is_allowed:
                found = Scrape((await call).text.decode())
            else:
                assert (await error_of(call)).code() == grpc.StatusCode.PERMISSION_DENIED
    assert found.counts("requests_refused_total", "reason") == {"INVALID_API_KEY": 1}


async def settled_aborts(port: int, count: int) -> Scrape:
    async def are_counted() -> bool:
        return (await scrape(port)).values("request_success_total", "finished_reason")["abort"] == count

    await wait_until(are_counted, f"{count} cancelled requests")
    return await scrape(port)


async def test_a_lost_worker_is_counted_and_no_count_goes_back() -> None:
    async with Services(gated_runner(0, permits=6), metrics_port=0) as services:
        port = services.service.metrics_port
        assert port is not None
        client = Client(services)
        streams = [asyncio.create_task(client.stream(request)) for request in mixed_requests(4)]
        await services.wait_load(lambda load: load.num_step_results == 6, "it is mid-way")
        before = await scrape(port)
        assert before["worker_up"] == 1
        await kill_worker(services)
        down = await scrape(port)
        assert (down["worker_up"], down["worker_losses_total"], down["worker_recovery_seconds_count"]) == (0, 1, 0)
        lost_at = time.monotonic()
        await services.start_worker(gated_runner(1, permits=100_000))
        await asyncio.gather(*streams)
        found = await settled(services, 4)
        recovered_s = found["worker_recovery_seconds_sum"]
        assert found["worker_recovery_seconds_count"] == found["worker_up"] == 1
        assert 0 < recovered_s < time.monotonic() - lost_at + 30
        check_against(found, client, 4)
        load = await services.load()
    assert found["worker_losses_total"] == load.num_worker_losses == 1
    for earlier, later in ((before, down), (down, found)):
        assert all(later.counted()[key] >= value for key, value in earlier.counted().items() if "process" not in key[0])


async def test_a_prefix_of_vllm_gives_the_names_that_pickers_and_dashboards_look_for() -> None:
    async with Services(metrics_port=0, metrics_prefix="vllm:", served_model_name="some/model") as services:
        await services.stream(stream_request())
        port = services.service.metrics_port
        assert port is not None
        found = await scrape(port, "vllm:")
        reply = await services.control.GetMetrics(
            control_pb2.GetMetricsRequest(accept="application/openmetrics-text; version=1.0.0")
        )
    # Those of the Gateway API's endpoint picker, and of vLLM's dashboard for Grafana.
    names = "num_requests_waiting num_requests_running kv_cache_usage_perc cache_config_info prompt_tokens_total"
    names += " generation_tokens_total request_success_total prefix_cache_queries_total prefix_cache_hits_total"
    histograms = "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds"
    histograms += " request_prompt_tokens request_generation_tokens request_queue_time_seconds"
    histograms += " request_prefill_time_seconds request_decode_time_seconds request_time_per_output_token_seconds"
    for name in [*names.split(), *(f"{each}_bucket" for each in histograms.split())]:
        assert name in found, name
        assert found.values(name, "model_name").keys() == {"some/model"}
    assert found.values("cache_config_info", "block_size") == {str(model_info().block_size): 1}
    assert reply.text.endswith(b"# EOF\n") and reply.content_type.startswith("application/openmetrics-text")


async def test_without_a_worker_there_are_metrics_too() -> None:
    services = Services(metrics_port=0)
    await services.start(has_worker=False)
    try:
        assert services.service.metrics_port is not None
        found = await scrape(services.service.metrics_port)
    finally:
        await services.stop()
    assert found["worker_up"] == 0 and "num_requests_running" not in found
    known = {f"tandem:{metric.name}" for metric in SCHEDULER_METRICS}
    assert {name for name in found.families if not name.startswith("process")} <= known


async def test_no_port_is_opened_unless_it_is_asked_for() -> None:
    async with Services() as services:
        assert services.service.metrics_port is None
