"""A trace through real processes: OpenAI's client, the gateway, the scheduler with front-end processes, the worker."""

from pathlib import Path

import pytest

from tests.e2e.conftest import StartEngine
from tests.e2e.gateway import GatewayProcess
from tests.support.chats import QWEN3_TEMPLATE
from tests.support.collector import check_phases, parent_of, running_collector
from tests.support.tokenizers import EMBEDDED


@pytest.mark.slow
def test_a_chat_over_http_is_one_trace(
    start_engine: StartEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    (tmp_path / "tokenizer.json").symlink_to(EMBEDDED)
    (tmp_path / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    with running_collector() as collector:
        traces = ("--otlp-traces-endpoint", collector.endpoint)
        flags = ["--tokenizer", str(tmp_path), "--api-server-count", "1", "--max-chunk-tokens", "16", *traces]
        engine = start_engine("embedded", dtype="float32", scheduler_flags=flags)
        gateway = GatewayProcess(engine.scheduler.address, tmp_path, *traces)
        try:
            with gateway.client() as client:
                trace_id, client_id, header = parent_of(1)
                stream = client.chat.completions.create(
                    model="embedded",
                    messages=[{"role": "user", "content": "To be, or not to be? " * 4}],
                    max_tokens=30,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_headers={"traceparent": header},
                    extra_body={"ignore_eos": True},
                )
                usage = [chunk.usage for chunk in stream][-1]
            trace = collector.trace(trace_id, "tandem-gateway", "tandem-scheduler")
        finally:
            gateway.kill()
            print(gateway.log_file.read_text())
    outer, inner = trace.server("tandem-gateway"), trace.server()
    assert (outer.parent_id, outer.name) == (client_id, "POST /v1/chat/completions")
    assert (inner.parent_id, inner.name) == (outer.span_id, "tandem.v1.InferenceService/GenerateStream")
    assert outer.start_ns <= inner.start_ns <= inner.end_ns
    check_phases(trace)
    assert usage is not None
    assert inner.attributes["gen_ai.usage.input_tokens"] == usage.prompt_tokens
    assert inner.attributes["gen_ai.usage.output_tokens"] == usage.completion_tokens == 30
    [_, prefill, _] = trace.below(inner)
    steps = trace.below(prefill)
    # The prompt takes a step for each chunk, and the steps' times are the worker's own.
    assert [step.attributes["tandem.step.num_request_tokens"] for step in steps[:-1]] == [16] * (len(steps) - 1)
    assert sum(step.attributes["tandem.step.num_request_tokens"] for step in steps) == usage.prompt_tokens
    assert len({step.instance for step in steps}) == 1 and all(step.duration_ns > 0 for step in steps)
    assert sum(step.duration_ns for step in steps) <= prefill.duration_ns
