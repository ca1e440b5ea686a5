"""`tandem generate` against a real server with a fake worker: what the flags of the connection do."""

import asyncio
from pathlib import Path

import pytest

from tandem import cli
from tandem_shared.config import WorkerSettings
from tandem_shared.rpc.credentials import server_credentials
from tests.contract.services import Services
from tests.contract.test_server import make_server, running
from tests.support.certificates import make_certificate


async def generate(address: str, *flags: str) -> int:
    return await asyncio.to_thread(cli.main, ["generate", "ROMEO:", "--address", address, *flags])


async def test_the_connections_flags_make_its_tls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    client_certificate, client_key = make_certificate(tmp_path, "client")
    ours = ["--client-cert", str(client_certificate), "--client-key", str(client_key)]
    settings = WorkerSettings(tls_cert=str(certificate), tls_key=str(key), tls_client_ca=str(client_certificate))
    # It knows no method of the inference service, and who gets as far as to hear so has come through TLS.
    async with running(make_server(credentials=server_credentials(settings))) as port:
        address = f"localhost:{port}"
        assert await generate(address, "--ca", str(certificate), *ours) == 1
        assert capsys.readouterr().err == "tandem generate: Method not found!\n"
        # Without TLS, with other authorities, and without a certificate.
        for flags in ([], ["--tls", *ours], ["--ca", str(certificate)]):
            assert await generate(address, "--timeout-s", "1", *flags) == 1
            assert "Method" not in capsys.readouterr().err


async def test_a_deadline_ends_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    async with Services() as services:
        flags = ["--max-tokens", "1000", "--ignore-eos"]
        assert await generate(services.address, *flags, "--timeout-s", "0.2") == 1
        assert "eadline" in capsys.readouterr().err
