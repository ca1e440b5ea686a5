"""The gateway's TLS on both sides: HTTPS for its clients, and TLS to the scheduler."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import openai
import pytest

from tandem_gateway.__main__ import main
from tandem_shared.config import WorkerSettings
from tandem_shared.rpc.credentials import channel_credentials, server_credentials
from tests.contract.services import MODEL, WAIT_S, Services
from tests.contract.test_server import make_server, running
from tests.support.certificates import make_certificate
from tests.support.chats import USER
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


async def test_openais_client_streams_through_https_and_a_scheduler_with_tls(folder: Path, tmp_path: Path) -> None:
    certificate, key = map(str, make_certificate(tmp_path, "scheduler"))
    shown, shown_key = map(str, make_certificate(tmp_path, "gateway"))
    https, https_key = map(str, make_certificate(tmp_path, "https"))
    stranger, stranger_key = map(str, make_certificate(tmp_path, "stranger"))
    credentials = channel_credentials(("ca", certificate), ("key", shown_key), ("certificate", shown))
    tls = {"tls_cert": certificate, "tls_key": key, "tls_client_ca": shown}
    ours = {"scheduler_ca": certificate, "scheduler_tls_cert": shown, "scheduler_tls_key": shown_key}
    async with Services(credentials=credentials, tokenizer=str(folder), **tls) as services:
        address = f"localhost:{services.address.rpartition(':')[2]}"
        async with Gateway(address, **ours, tls_cert=https, tls_key=https_key) as gateway:
            async with https_client(gateway.port, https) as client:
                asked: Any = {"model": MODEL, "messages": [USER], "max_tokens": 9, "temperature": 0}
                whole = await client.chat.completions.create(**asked)
                stream = await client.chat.completions.create(**asked, stream=True)
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
                assert text == whole.choices[0].message.content and text
            async with https_client(gateway.port, stranger) as client:
                with pytest.raises(openai.APIConnectionError):
                    await client.models.list()
        # Another authority than the scheduler's, a certificate that the scheduler does not know, none, and no TLS.
        wrong = (
            {**ours, "scheduler_ca": stranger},
            {**ours, "scheduler_tls_cert": stranger, "scheduler_tls_key": stranger_key},
            {"scheduler_ca": certificate},
            {},
        )
        for flags in wrong:
            async with Gateway(address, **flags) as gateway:
                for answer in (
                    await gateway.post("/v1/chat/completions", {"messages": [USER], "stream": True, "model": MODEL}),
                    await gateway.get("/health"),
                ):
                    assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
                    assert answer.error()["message"].startswith("the scheduler can't be reached: ")


def https_client(port: int, authority: str) -> openai.AsyncOpenAI:
    """OpenAI's client of the gateway, which trusts one authority."""
    http = openai.DefaultAsyncHttpxClient(verify=ssl.create_default_context(cafile=authority))
    return openai.AsyncOpenAI(base_url=f"https://localhost:{port}/v1", api_key="none", max_retries=0, http_client=http)


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
