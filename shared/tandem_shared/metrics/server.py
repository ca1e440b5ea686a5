"""The HTTP port from which Prometheus reads a service's metrics.

A thread serves it, so that a slow scraper holds up nobody. The values are read in the service's event loop, at one
moment; if the loop stands still, the scrape fails, as it should. What goes wrong on the way is a line in the log: the
standard library would write tracebacks to stderr, where whoever reaches the port could fill the log with them.
"""

import asyncio
import io
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, TextIO, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from tandem_shared.errors import ConfigError
from tandem_shared.metrics.exposition import readable

READ_TIMEOUT_S = 5.0
"""How long the event loop may take to give its values. Prometheus waits 10 s for a scrape by default."""
CONNECTION_TIMEOUT_S = 10.0
"""How long a scraper may be silent."""
MAX_CONNECTIONS = 16
"""Scrapers that are served at once."""
PLACE_TIMEOUT_S = 1.0
"""How long a further one waits for a place. Then its connection is closed."""
POLL_S = 0.1
"""How soon the thread notices that it is to stop."""

logger = logging.getLogger(__name__)

Read = Callable[[], Collector]


class MetricsServer:
    """Serves the metrics until it is stopped."""

    def __init__(self, read: Read) -> None:
        """read: gives the values of now. It is called in the event loop in which start() was."""
        self._read = read
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def start(self, host: str, port: int) -> int:
        """Listens and returns the port. Raises ConfigError if the port can't be taken."""
        registry = CollectorRegistry()
        registry.register(_LoopCollector(self._read, asyncio.get_running_loop()))
        ProcessCollector(registry=registry)
        server_class = _Server6 if ":" in host else _Server
        try:
            self._server = make_server(host, port, _guarded(make_wsgi_app(registry)), server_class, _Handler)
        except OSError as error:
            raise ConfigError(f"--metrics-port: can't listen on {host}:{port}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=[POLL_S], name="metrics", daemon=True)
        self._thread.start()
        bound: int = self._server.server_address[1]
        logger.info("metrics on http://%s:%d/metrics", f"[{host}]" if ":" in host else host, bound)
        return bound

    def stop(self) -> None:
        """Takes up to PLACE_TIMEOUT_S, so it should not be called in an event loop."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


def _guarded(app: WSGIApplication) -> WSGIApplication:
    """The application, which answers whatever a scraper says that it reads, and 500 if the values can't be had.

    It makes one answer at a time: each takes milliseconds of the interpreter's time, and many would slow the service.
    """
    making = threading.Lock()

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ["HTTP_ACCEPT"] = readable(environ.get("HTTP_ACCEPT", ""))
        try:
            with making:
                return app(environ, start_response)
        except TimeoutError:
            logger.warning("a scrape failed: the service did not give its values within %g s", READ_TIMEOUT_S)
        except Exception:
            logger.exception("a scrape failed")
        start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
        return [b"the values can't be had; the log has more\n"]

    return answer


class _LoopCollector(Collector):
    """Reads the values in an event loop, from another thread."""

    def __init__(self, read: Read, loop: asyncio.AbstractEventLoop) -> None:
        self._read_values = read
        self._loop = loop

    def collect(self) -> Iterator[Family]:
        return iter(asyncio.run_coroutine_threadsafe(self._read(), self._loop).result(READ_TIMEOUT_S).collect())

    async def _read(self) -> Collector:
        return self._read_values()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any) -> None:
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*arguments)

    def server_bind(self) -> None:
        # HTTPServer's own also looks up the host's name, which may take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(timeout=PLACE_TIMEOUT_S):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Scrapers that are silent or go away are no news."""
        logger.debug("the connection of a scraper failed", exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = CONNECTION_TIMEOUT_S

    def log_message(self, format: str, *arguments: object) -> None:
        """Scrapes are no news."""

    def get_stderr(self) -> TextIO:
        return cast(TextIO, _DebugLog())

    def address_string(self) -> str:
        return str(self.client_address[0])


class _DebugLog(io.TextIOBase):
    """Where wsgiref tells of answers that could not be sent."""

    def write(self, text: str) -> int:
        logger.debug("%s", text.rstrip())
        return len(text)
