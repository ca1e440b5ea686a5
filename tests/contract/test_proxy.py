"""A proxy in the environment is for what lies beyond this machine; Tandem's own links don't use it."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem_shared.rpc.grpc_options import is_local
from tests.contract.services import Services, model_info
from tests.support.fake_worker import FakeRunner

REPOSITORY = Path(__file__).resolve().parents[2]
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:9")
"""The port of the discard service, at which nothing listens."""

CLIENT = "import sys, tandem; print(tandem.TandemClient(sys.argv[1]).model_info().model)"


async def test_a_local_server_and_its_worker_are_reached_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    async with Services(FakeRunner(model_info())) as services:
        port = services.address.rpartition(":")[2]
        commands = [
            ([sys.executable, "-c", CLIENT, f"127.0.0.1:{port}"], "embedded"),
            ([sys.executable, "-c", CLIENT, f"localhost:{port}"], "embedded"),
            ([sys.executable, "-m", "tandem_shared.rpc.health_probe", f"127.0.0.1:{port}"], "SERVING"),
        ]
        for command, answer in commands:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=REPOSITORY, env=dict(os.environ), stdout=subprocess.PIPE
            )
            output, _ = await process.communicate()
            assert output.decode().strip() == answer


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:50051", True),
        ("127.9.9.9:1", True),
        ("[::1]:50051", True),
        ("localhost:50051", True),
        ("LOCALHOST:50051", True),
        ("dns:///localhost:50051", True),
        ("dns://10.0.0.1/localhost:50051", True),
        ("ipv4:127.0.0.1:50051", True),
        ("ipv6:[::1]:50051", True),
        ("unix:/tmp/tandem.sock", True),
        ("unix:///tmp/tandem.sock", True),
        ("unix-abstract:tandem", True),
        ("10.0.0.1:50051", False),
        ("[2001:db8::1]:50051", False),
        ("gpu-host:50051", False),
        ("unix-host:50051", False),
        ("localhost.example.org:50051", False),
        ("dns:///gpu-host:50051", False),
    ],
)
def test_only_what_is_certainly_this_machine_is_local(address: str, expected: bool) -> None:
    assert is_local(address) is expected
