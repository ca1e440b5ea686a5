"""Metrics of real processes: a scheduler with front-end processes, and a worker that is killed under streams."""

import urllib.request

import pytest

from tests.contract.services import stream_request
from tests.e2e.conftest import StartEngine
from tests.e2e.services import free_port
from tests.e2e.waiting import WAIT_S, wait_until
from tests.support.metrics import Scrape

pytestmark = pytest.mark.slow


def scrape(port: int) -> Scrape:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as response:
        return Scrape(response.read().decode())


def try_scrape(port: int) -> Scrape | None:
    try:
        return scrape(port)
    except OSError:
        return None


def test_a_killed_worker_is_seen_in_the_metrics_of_both_services(start_engine: StartEngine) -> None:
    port, worker_port = free_port(), free_port()
    engine = start_engine(
        scheduler_flags=["--metrics-port", str(port), "--api-server-count", "2"],
        worker_flags=["--metrics-port", str(worker_port)],
    )
    streams = [engine.stream(stream_request(range(1, 30), 150, seed=index)) for index in range(4)]
    for stream in streams:
        stream.wait_tokens(20)
    before, worker_before = scrape(port), scrape(worker_port)
    assert (before["worker_up"], before["num_requests_running"], before["worker_losses_total"]) == (1, 4, 0)
    assert worker_before["worker_session_open"] == 1 and worker_before["worker_tokens_total"] >= 80
    assert before["step_time_seconds_sum"] > 0 and before["wire_time_seconds_sum"] > 0
    engine.worker.serving().kill()
    num_tokens = sum(len(stream.result()) for stream in streams)
    wait_until(lambda: scrape(port)["request_params_n_count"] == 4, "all requests are closed")
    gaps = num_tokens - 4
    wait_until(lambda: scrape(port)["inter_token_latency_seconds_count"] == gaps, "both front ends have told")
    found = scrape(port)
    assert found.values("request_success_total", "finished_reason")["length"] == 4
    assert found["request_generation_tokens_sum"] == num_tokens == 4 * 150
    assert found["worker_losses_total"] == found["worker_recovery_seconds_count"] == found["worker_up"] == 1
    # The gap that the loss made is in the histogram of gaps, as its client sees it.
    assert found["inter_token_latency_seconds_sum"] > found["worker_recovery_seconds_sum"] > 0
    # The worker that was started again counts anew, on the same port.
    wait_until(lambda: try_scrape(worker_port) is not None, "the next worker's port")
    assert scrape(worker_port)["worker_sessions_total"] == 1
    assert scrape(worker_port)["worker_tokens_total"] < 4 * 150
