"""What the scheduler service writes to its log about requests, and what it never writes."""

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tandem_scheduler.observers import load_log
from tests.contract.gated_worker import gated_runner, open_gate
from tests.contract.services import Services, error_of, stream_request, wait_until
from tests.e2e.waiting import wait_until as wait_for
from tests.support.certificates import make_certificate
from tests.support.gateway import HOST, Gateway, read_answer
from tests.support.tokenizers import embedded

SECRET = "Mordecai and Esther"
LINE = re.compile(r"request (\S+): (\d+) tokens in \((\d+) cached\), (\d+) out.*: (\w+)$")


def request_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, ...]]:
    found = [LINE.match(record.getMessage()) for record in caplog.records]
    return [match.groups() for match in found if match is not None]


async def test_requests_have_their_lines_which_say_nothing_of_what_they_ask(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    # gRPC's and asyncio's own are no lines of ours.
    async with Services() as services:
        first = await services.stream(stream_request(SECRET, 20, request_id="first", cache_salt="the salt"))
        await services.generate(stream_request(SECRET, 5, request_id="second", num_choices=2, cache_salt="the salt"))
        await error_of(services.stream(stream_request(SECRET, 5, request_id="third", top_p=3.0)))

        async def are_there() -> bool:
            return len(request_lines(caplog)) == 2

        await wait_until(are_there, "the lines")
    num_tokens = len(embedded().encode(SECRET).ids)
    cached = [line[2] for line in request_lines(caplog)]
    assert request_lines(caplog) == [
        ("first", str(num_tokens), cached[0], "20", "length"),
        ("second", str(num_tokens), cached[1], "10", "length"),
    ]
    written = "\n".join(
        f"{record.getMessage()} {json.dumps(record.__dict__, default=str)}" for record in caplog.records
    )
    assert first.choices[0].text
    for secret in (SECRET, first.choices[0].text, "the salt"):
        assert secret not in written and json.dumps(secret)[1:-1] not in written


@pytest.mark.parametrize("form", ["none", "all"])
async def test_lines_of_requests_can_be_left_out(form: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Services(log_requests=form) as services:
        await asyncio.gather(*(services.stream(stream_request(max_tokens=2)) for _ in range(30)))

        async def is_closed() -> bool:
            return services.service._hub._num_open == 0

        await wait_until(is_closed, "the requests are closed")
    assert len(request_lines(caplog)) == (30 if form == "all" else 0)


async def test_a_busy_engine_says_how_busy_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(load_log, "LINE_EVERY_S", 0.05)

    def load_lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == load_log.__name__]

    async with Services(gated_runner(0), max_num_seqs=1) as services:
        # There was time for lines, and nothing to say.
        streams = [asyncio.create_task(services.stream(stream_request(max_tokens=4))) for _ in range(3)]

        async def is_told() -> bool:
            return any("1 running, 2 waiting; 0.0 tokens/s out" in line for line in load_lines())

        await wait_until(is_told, "the load of a worker that stands still")
        open_gate(services.runner)
        await asyncio.gather(*streams)

        async def is_told_of_tokens() -> bool:
            rates = [re.search(r"; ([\d,.]+) tokens/s out", line) for line in load_lines()]
            return any(rate is not None and rate[1] != "0.0" for rate in rates)

        await wait_until(is_told_of_tokens, "the rate of tokens")
        await services.wait_load(lambda load: not load.num_steps_in_flight, "it is idle")
        await asyncio.sleep(0.2)
        num_lines = len(load_lines())
        await asyncio.sleep(0.2)
        assert len(load_lines()) == num_lines


def test_what_comes_without_tls_writes_no_line_that_is_no_json(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    port_file = tmp_path / "port"
    flags = {"tls-cert": certificate, "tls-key": key, "port-file": port_file, "port": 0, "worker-address": f"{HOST}:1"}
    program = [sys.executable, "-m", "tandem_scheduler", "--model", "embedded", "--log-format", "json"]
    program += [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    with (tmp_path / "log").open("w") as log, subprocess.Popen(program, stderr=log, env=environment) as server:
        try:
            wait_for(lambda: port_file.exists() and port_file.read_text() != "", "it listens")
            for sent in (b"\0" * 50, b"GET / HTTP/1.1\r\n\r\n"):
                with socket.create_connection((HOST, int(port_file.read_text())), timeout=20) as client:
                    client.sendall(sent)
                    # The server closes the connection once the handshake has failed.
                    with contextlib.suppress(ConnectionResetError):
                        while client.recv(4096):
                            pass
        finally:
            server.terminate()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines and all(json.loads(line)["service"] == "scheduler" for line in lines)


async def test_what_is_no_http_is_answered_and_no_news(caplog: pytest.LogCaptureFixture) -> None:
    async with Services() as services, Gateway(services.address) as gateway:
        # The gateway has set up logging anew.
        logging.getLogger().addHandler(caplog.handler)
        for sent in (b"\x16\x03\x01 no HTTP\r\n\r\n", b"GET / HTTP/1.1\r\nx-id: a\x1b[31m\r\n\r\n"):
            reader, writer = await asyncio.open_connection(HOST, gateway.port)
            writer.write(sent)
            assert (await read_answer(reader)).status == 400
            writer.close()
        logging.getLogger().removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
