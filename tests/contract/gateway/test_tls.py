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


async def status(gateway: Gateway, context: ssl.SSLContext | None) -> int:
    """The status of a request of its own connection, with TLS if there is a context."""
    reader, writer = await asyncio.open_connection("localhost", gateway.port, ssl=context)
    writer.write(head("GET", "/version", 0))
    answer = await asyncio.wait_for(read_answer(reader), WAIT_S)
    writer.close()
    return answer.status


REFUSALS = (ssl.SSLError, asyncio.IncompleteReadError, ConnectionError)


async def test_with_a_certificate_only_https_is_spoken_and_clients_must_be_known(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    client_certificate, client_key = make_certificate(tmp_path, "client")
    settings = {"tls_cert": str(certificate), "tls_key": str(key), "tls_client_ca": str(client_certificate)}
    async with Gateway("127.0.0.1:1", **settings) as gateway:
        context = ssl.create_default_context(cafile=str(certificate))
        for each in (None, context):
            with pytest.raises(REFUSALS):
                await status(gateway, each)
        context.load_cert_chain(client_certificate, client_key)
        assert await status(gateway, context) == 200


async def test_certificates_that_have_changed_are_read_again(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    next_certificate, next_key = make_certificate(tmp_path, "next")
    old, new = (ssl.create_default_context(cafile=str(each)) for each in (certificate, next_certificate))
    async with Gateway("127.0.0.1:1", tls_cert=str(certificate), tls_key=str(key)) as gateway:

        async def is_trusted_by(context: ssl.SSLContext) -> bool:
            try:
                _, writer = await asyncio.open_connection("localhost", gateway.port, ssl=context)
            except ssl.SSLError:
                return False
            writer.close()
            return True

        assert [await is_trusted_by(old), await is_trusted_by(new)] == [True, False]
        certificate.write_text("not a certificate")
        assert await is_trusted_by(old)
        next_key.replace(key)
        next_certificate.replace(certificate)
        assert [await is_trusted_by(old), await is_trusted_by(new)] == [False, True]


async def test_so_is_the_authority_of_clients(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    contexts = []
    for name in ("old", "new"):
        shown, shown_key = make_certificate(tmp_path, name)
        contexts.append(ssl.create_default_context(cafile=str(certificate)))
        contexts[-1].load_cert_chain(shown, shown_key)
    old, new = contexts
    settings = {"tls_cert": str(certificate), "tls_key": str(key), "tls_client_ca": str(tmp_path / "old.pem")}
    async with Gateway("127.0.0.1:1", **settings) as gateway:
        assert await status(gateway, old) == 200
        with pytest.raises(REFUSALS):
            await status(gateway, new)
        (tmp_path / "new.pem").replace(tmp_path / "old.pem")
        assert await status(gateway, new) == 200
        with pytest.raises(REFUSALS):
            await status(gateway, old)


async def test_a_gateway_shows_a_new_certificate_to_the_scheduler_from_the_next_call_on(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "scheduler")
    shown, shown_key = make_certificate(tmp_path, "gateway")
    known, known_key = make_certificate(tmp_path, "known")
    settings = WorkerSettings(tls_cert=str(certificate), tls_key=str(key), tls_client_ca=str(tmp_path / "authority"))
    (tmp_path / "authority").write_bytes(known.read_bytes())
    # As above, 501 is said by a server that was reached.
    async with running(make_server(credentials=server_credentials(settings))) as port:
        flags = {"scheduler_tls_cert": str(shown), "scheduler_tls_key": str(shown_key)}
        async with Gateway(f"localhost:{port}", scheduler_ca=str(certificate), **flags) as gateway:
            assert (await gateway.get("/v1/models")).status == 503
            known_key.replace(shown_key)
            known.replace(shown)
            assert (await gateway.get("/v1/models")).status == 501


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


@pytest.mark.parametrize("num_workers", ["1", "2"])
@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--api-key-file FILE", "--api-key-file FILE, line 1: must be NAME SCOPES KEY"),
        ("--tls-cert FILE --tls-key FILE", "--tls-cert, --tls-key or --tls-client-ca: "),
    ],
)
def test_wrong_files_are_refused_before_a_process_starts(
    flags: str, problem: str, num_workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong").write_text("wrong\n")
    given = flags.replace("FILE", str(tmp_path / "wrong")).split()
    with pytest.raises(SystemExit) as end:
        main([*given, "--http-port", "0", "--http-workers", num_workers])
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tandem-gateway: {problem.replace('FILE', str(tmp_path / 'wrong'))}")
