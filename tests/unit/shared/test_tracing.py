"""Traces are off unless they are asked for, and then cost no import; what asks for them wrongly is told so."""

import logging
import subprocess
import sys

import pytest
from opentelemetry.propagate import extract

from tandem_shared.config import SchedulerSettings, read_command_line
from tandem_shared.errors import ConfigError
from tandem_shared.tracing import SpanExport, check_traces

STARTED = """
import asyncio, sys
from tandem_scheduler.service import SchedulerService
from tandem_shared.config import SchedulerSettings
{gateway}
async def main():
    service = SchedulerService(SchedulerSettings(port=0, api_server_count=0, worker_address='127.0.0.1:1'))
    await service.start()
    await service.stop(0)

asyncio.run(main())
print(sorted(name for name in sys.modules if name.startswith('opentelemetry')))
"""
GATEWAY = """
from tandem_gateway.app import make_app
from tandem_shared.gateway_settings import GatewaySettings
make_app(GatewaySettings())
"""


def modules_of(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_headers_that_clients_send_are_no_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    span = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    export = SpanExport("http://127.0.0.1:1")
    for state in ("=", "a=1,a=2", "a", "x" * 9000, "A=\x1b[31m"):
        for parent in (span, "ff" + span[2:], "0" * 600):
            extract({"traceparent": parent, "tracestate": state, "baggage": "k=v;" * 1000 + state})
    export.close()
    assert caplog.records == []


def test_without_traces_no_sdk_is_imported() -> None:
    assert modules_of(STARTED.format(gateway="")) == "[]\n"
    # FastAPI imports OpenTelemetry's API, whoever uses it.
    with_gateway = modules_of(STARTED.format(gateway=GATEWAY))
    assert "opentelemetry.sdk" not in with_gateway and "opentelemetry.exporter" not in with_gateway


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "grpc://collector:4317", "http://", "collector", "/v1/traces"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    for ask in (check_traces, SpanExport):
        with pytest.raises(ConfigError, match="--otlp-traces-endpoint must be a URL such as http"):
            ask(endpoint)
    with pytest.raises(SystemExit) as ended:
        read_command_line(SchedulerSettings, "tandem-scheduler", "Tests.", ["--otlp-traces-endpoint", endpoint])
    assert ended.value.code == 2 and "must be a URL" in capsys.readouterr().err


@pytest.mark.parametrize(("variable", "value"), [("COMPRESSION", "zip"), ("TIMEOUT", "soon")])
def test_a_wrong_variable_of_opentelemetrys_is_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{variable}", value)
    with pytest.raises(ConfigError, match=f"OpenTelemetry can't send traces: .*{value}"):
        SpanExport("http://127.0.0.1:4317")


def test_a_url_is_taken() -> None:
    check_traces("")
    check_traces("http://127.0.0.1:4317")
    check_traces("https://collector.example:4317")
