"""The probe that containers' health checks run, against a real server, in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

ServingStatus = health_pb2.HealthCheckResponse.ServingStatus


@pytest.fixture
def address() -> Iterator[str]:
    """A server that lives, with one service that is ready and one that is not."""
    servicer = health.HealthServicer()
    servicer.set("ready", ServingStatus.SERVING)
    servicer.set("waiting", ServingStatus.NOT_SERVING)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def probe(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tandem_shared.rpc.health_probe", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        ([], (0, "SERVING")),
        (["ready"], (0, "SERVING")),
        (["waiting"], (1, "NOT_SERVING")),
        (["unknown"], (1, "NOT_FOUND")),
    ],
)
def test_status_is_printed_and_is_the_exit_status(address: str, service: list[str], expected: tuple[int, str]) -> None:
    assert probe(address, *service) == expected


def test_nobody_there() -> None:
    # Port 1 is tcpmux, which nobody runs.
    assert probe("127.0.0.1:1") == (1, "UNAVAILABLE")


def test_usage() -> None:
    assert probe()[0] == 2
