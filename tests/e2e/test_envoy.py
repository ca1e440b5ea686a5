"""Envoy before the scheduler, with the configuration that docs/deployment.md shows, docs/envoy.yaml."""

import contextlib
import platform
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from tandem import SamplingParams, TandemClient
from tandem_shared.rpc.health_probe import health_status
from tests.e2e.conftest import StartEngine
from tests.e2e.services import INFERENCE, REPOSITORY, Engine, free_port
from tests.e2e.waiting import WAIT_S, wait_until

PROGRAM = Path(sys.executable).with_name("envoy")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_GROWTH_BYTES = 64 * 2**20

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="no envoy for this system is on PyPI"
)


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name: str, value: str) -> bytes:
    return bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


HEADERS = b"".join(
    header(*pair)
    for pair in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", f"/{INFERENCE}/GenerateStream"),
        (":authority", "tandem"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]
)


def resets() -> bytes:
    return b"".join(
        frame(1, HEADERS, flags=4, stream=number) + frame(3, struct.pack(">I", 8), stream=number)
        for number in range(1, 20_001, 2)
    )


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine) -> Engine:
    return start_engine("embedded", dtype="float32")


@pytest.fixture(scope="module")
def envoy(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Starts Envoy; gives the address that it listens on, and its process id."""
    port = free_port()
    text = (REPOSITORY / "docs/envoy.yaml").read_text()
    text, num_changes = re.subn(r"\b50050\b", str(port), text)
    text, more = re.subn(r"\b50051\b", str(engine.scheduler.port), text)
    assert (num_changes, more) == (1, 1)
    path: Path = tmp_path_factory.mktemp("envoy") / "envoy.yaml"
    path.write_text(text)
    with subprocess.Popen([str(PROGRAM), "-c", str(path), "--concurrency", "1", "--log-level", "error"]) as process:
        address = f"127.0.0.1:{port}"
        try:
            wait_until(lambda: health_status(address, INFERENCE) == "SERVING", "Envoy passes calls on")
            yield address, process.pid
        finally:
            process.terminate()


def test_streams_pass_and_the_control_service_does_not(envoy: tuple[str, int]) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with TandemClient(envoy[0]) as client:
        assert sum(len(delta.token_ids) for delta in client.generate_stream("ROMEO:", params, timeout_s=WAIT_S)) == 8
        with pytest.raises(grpc.RpcError) as caught:
            client.drain(timeout_s=WAIT_S)
        assert isinstance(caught.value, grpc.Call) and caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(frame(6, b"12345678") * 10_000, id="pings"),
        pytest.param(frame(4) * 10_000, id="settings"),
        pytest.param(resets(), id="resets"),
    ],
)
def test_a_flood_is_cut_off(engine: Engine, envoy: tuple[str, int], flood: bytes) -> None:
    address, pid = envoy
    processes = [psutil.Process(pid), *psutil.Process(pid).children(), psutil.Process(engine.scheduler.process.pid)]
    before = [process.memory_info().rss for process in processes]
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as hostile:
        hostile.sendall(PREFACE + frame(4))
        # The client sends until its connection is cut, and reads nothing.
        with contextlib.suppress(ConnectionError):
            while True:
                hostile.sendall(flood)
    assert health_status(address, INFERENCE) == "SERVING"
    for process, rss in zip(processes, before, strict=True):
        assert process.memory_info().rss - rss < MAX_GROWTH_BYTES
