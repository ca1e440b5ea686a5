"""The gateway's TLS on both sides: HTTPS for its clients, and TLS to the scheduler."""

import asyncio
import ssl
from pathlib import Path

import pytest

from tandem_gateway.__main__ import main
from tandem_shared.config import WorkerSettings
from tandem_shared.rpc.server import server_credentials
from tests.contract.services import WAIT_S
from tests.contract.test_server import make_certificate, make_server, running
from tests.support.gateway import Gateway, head, read_answer


async def test_a_gateway_shows_its_certificate_to_the_scheduler(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "scheduler")
    shown, shown_key = make_certificate(tmp_path, "gateway")
    settings = WorkerSettings(tls_cert=str(certificate), tls_key=str(key), tls_client_ca=str(shown))
    # The server has no method of the inference service, and only a call that came through TLS hears of that.
    async with running(make_server(credentials=server_credentials(settings))) as port:
        address = f"localhost:{port}"
        authority = {"scheduler_ca": str(certificate)}
        pair = {"scheduler_tls_cert": str(shown), "scheduler_tls_key": str(shown_key)}
        for flags, status in (({**authority, **pair}, 501), (authority, 503), ({}, 503)):
            async with Gateway(address, **flags) as gateway:
                assert (await gateway.get("/v1/models")).status == status


async def test_with_a_certificate_only_https_is_spoken_and_clients_must_be_known(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    client_certificate, client_key = make_certificate(tmp_path, "client")
    settings = {"tls_cert": str(certificate), "tls_key": str(key), "tls_client_ca": str(client_certificate)}
    async with Gateway("127.0.0.1:1", **settings) as gateway:

        async def status(context: ssl.SSLContext | None) -> int:
            reader, writer = await asyncio.open_connection("localhost", gateway.port, ssl=context)
            writer.write(head("GET", "/version", 0))
            answer = await asyncio.wait_for(read_answer(reader), WAIT_S)
            writer.close()
            return answer.status

        context = ssl.create_default_context(cafile=str(certificate))
        for each in (None, context):
            with pytest.raises((ssl.SSLError, asyncio.IncompleteReadError, ConnectionError)):
                await status(each)
        context.load_cert_chain(client_certificate, client_key)
        assert await status(context) == 200


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--tls-cert c.pem", "--tls-cert and --tls-key go together"),
        ("--tls-client-ca c.pem", "--tls-client-ca needs --tls-cert and --tls-key"),
        ("--scheduler-tls-key k.pem", "--scheduler-tls-cert and --scheduler-tls-key go together"),
        ("--scheduler-tls-cert c.pem --scheduler-tls-key k.pem", "--scheduler-tls-cert needs --scheduler-ca"),
        ("--scheduler-ca no.pem", "--scheduler-ca: no.pem is no file"),
    ],
)
def test_wrong_flags_are_named(flags: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(flags.split())
    assert end.value.code == 2
    assert capsys.readouterr().err == f"tandem-gateway: {problem}\n"
