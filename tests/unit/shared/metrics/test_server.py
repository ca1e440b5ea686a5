"""The port of the metrics: scrapers that are silent, scrapes that fail, a port that is taken."""

import asyncio
import gzip
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator

import pytest
from prometheus_client import Metric as Family

from tandem_shared.errors import ConfigError
from tandem_shared.metrics import server as module
from tandem_shared.metrics.exposition import Metric, Samples
from tandem_shared.metrics.server import MetricsServer

LEVEL = Metric("level", "gauge", "A level.")
HOST = "127.0.0.1"


class Source:
    """Gives a number that rises with each scrape, unless it is broken."""

    def __init__(self) -> None:
        self.num_scrapes = 0
        self.is_broken = False

    def read(self) -> Samples:
        asyncio.get_running_loop()
        if self.is_broken:
            raise RuntimeError("broken")
        self.num_scrapes += 1
        return Samples("x:", {}, [(LEVEL, {(): self.num_scrapes})])


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
async def port(source: Source) -> AsyncIterator[int]:
    server = MetricsServer(source.read)
    yield server.start(HOST, 0)
    await asyncio.to_thread(server.stop)


async def get(port: int, headers: dict[str, str] | None = None) -> bytes:
    request = urllib.request.Request(f"http://{HOST}:{port}/metrics", headers=headers or {})
    return await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=20).read())


async def test_each_scrape_reads_anew_and_a_failed_one_ends_nothing(port: int, source: Source) -> None:
    assert b"\nx:level 1.0\n" in await get(port)
    source.is_broken = True
    with pytest.raises(urllib.error.HTTPError, match="500"):
        await get(port)
    source.is_broken = False
    # As Prometheus 2 asks.
    openmetrics = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    assert b"\nx:level 2.0\n# HELP process" in await get(port, {"Accept": openmetrics})
    compressed = await get(port, {"Accept-Encoding": "gzip"})
    assert b"\nx:level 3.0\n" in gzip.decompress(compressed)
    assert b"process_resident_memory_bytes" in gzip.decompress(compressed)


async def test_silent_scrapers_hold_up_nobody_for_long(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(module, "PLACE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(module._Handler, "timeout", 0.2)
    server = MetricsServer(source.read)
    port = server.start(HOST, 0)
    silent = [socket.create_connection((HOST, port)) for _ in range(5)]
    try:
        async with asyncio.timeout(20):
            while True:
                try:
                    assert b"x:level" in await get(port)
                    break
                except OSError:
                    # There was no place for it yet.
                    await asyncio.sleep(0.05)
    finally:
        for each in silent:
            each.close()
        await asyncio.to_thread(server.stop)


async def test_a_loop_that_stands_still_fails_the_scrape(
    port: int, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_TIMEOUT_S", 0.05)
    with socket.create_connection((HOST, port)) as scraper:
        scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        # This holds up the event loop.
        assert scraper.recv(65536).startswith(b"HTTP/1.0 500 ")
    assert b"x:level" in await get(port)


async def test_one_answer_is_made_at_a_time() -> None:
    num_now, most = 0, 0

    class Slow(Samples):
        def collect(self) -> Iterator[Family]:
            nonlocal num_now, most
            num_now += 1
            most = max(most, num_now)
            time.sleep(0.02)
            num_now -= 1
            yield from super().collect()

    server = MetricsServer(lambda: Slow("x:", {}, [(LEVEL, {(): 1})]))
    port = server.start(HOST, 0)
    answers = await asyncio.gather(*(get(port) for _ in range(6)))
    await asyncio.to_thread(server.stop)
    assert most == 1 and all(b"x:level 1.0" in answer for answer in answers)


async def test_whatever_a_scraper_reads_there_is_an_answer_and_no_traceback(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module._Handler, "timeout", 0.05)
    for version in ("zz", "1.0.0", "", "1..0", "9" * 5000, "\xb2"):
        for kind in ("application/openmetrics-text", "text/plain"):
            assert b"\nx:level " in await get(port, {"Accept": f"{kind};version={version};escaping=x"})
    for sent in (b"", b"GET /met", b"\x00\xff\r\n\r\n"):
        with socket.create_connection((HOST, port)) as scraper:
            scraper.settimeout(10)
            scraper.sendall(sent)
            # The server closes the connection, if only because it was silent.
            await asyncio.to_thread(lambda: b"".join(iter(lambda: scraper.recv(65536), b"")))
    assert capfd.readouterr().err == ""


async def test_a_taken_port_is_a_wrong_setting(port: int) -> None:
    with pytest.raises(ConfigError, match=f"--metrics-port: can't listen on {HOST}:{port}: "):
        MetricsServer(Source().read).start(HOST, port)


async def test_it_listens_on_version_6_of_ip_too(source: Source) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    server = MetricsServer(source.read)
    try:
        port = server.start("::1", 0)
    except ConfigError as error:
        pytest.skip(str(error))
    response = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://[::1]:{port}/", timeout=20).read())
    await asyncio.to_thread(server.stop)
    assert b"x:level" in response
