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


@pytest.mark.parametrize("way", ["flag", "variable", "none", "wrong"])
async def test_the_key_is_a_flags_or_a_variables(
    tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "key-for-inference-0001"
    (tmp_path / "keys").write_text(f"alice inference {key}\n")
    if way in ("variable", "wrong"):
        monkeypatch.setenv("TANDEM_API_KEY", key if way == "variable" else "something else")
    async with Services(api_key_file=str(tmp_path / "keys")) as services:
        flags = ["--api-key", key] if way == "flag" else []
        status = await generate(services.address, "--max-tokens", "2", *flags)
    assert status == (0 if way in ("flag", "variable") else 1)
    assert ("API key" in capsys.readouterr().err) == bool(status)
