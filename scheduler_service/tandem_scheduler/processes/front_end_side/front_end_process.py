"""A front end as a process of its own, started by the scheduler process (front_end_pool.py) and ending with it.

It has the public server and no step loop. It lives as long as its stream to the scheduler process, which ends the
stream when the front end is to leave. So it ignores signals, which a terminal or a supervisor may send to all
processes.
"""

import asyncio
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from tandem_scheduler.control.audit import audited
from tandem_scheduler.control.forwarder import create_forwarder
from tandem_scheduler.front_end.grpc_api.public_server import PublicServer
from tandem_scheduler.processes.front_end_side.remote_engine import RemoteEngine
from tandem_shared.config import SchedulerSettings, read_command_line
from tandem_shared.errors import ConfigError, ModelError, WorkerUnavailable
from tandem_shared.host.log import configure_logging
from tandem_shared.host.process import end_with_parent, leave
from tandem_shared.options import option

CONNECT_TIMEOUT_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrontEndSettings(SchedulerSettings):
    """The scheduler's settings, with the port chosen and the tokenizer as a folder."""

    engine_socket: str = option("", "Unix domain socket of the scheduler process")
    parent_pid: int = option(0, "process id of the scheduler process", minimum=1)


async def serve(settings: FrontEndSettings) -> None:
    engine = RemoteEngine(settings.engine_socket)
    await engine.connect(CONNECT_TIMEOUT_S)
    server = PublicServer(
        settings,
        Path(settings.tokenizer),
        lambda _: engine,
        audited(create_forwarder(engine.control)),
        shares_port=True,
        ends_process=True,
    )
    await server.start()
    status = 0
    try:
        await engine.run(server.front_end)
    except WorkerUnavailable as error:
        logger.error("the stream to the scheduler process broke: %s", error)
        status = 1
    except Exception:
        logger.exception("the stream to the scheduler process failed")
        status = 1
    server.front_end.end_all(WorkerUnavailable("the server is stopping"))
    await server.stop()
    leave(status)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    settings = read_command_line(FrontEndSettings, "tandem-front-end", "Serves clients of a scheduler process.")
    end_with_parent(settings.parent_pid)
    configure_logging(settings.log_level, settings.log_format, f"front-end {os.getpid()}")
    try:
        asyncio.run(serve(settings))
    except (ConfigError, ModelError, WorkerUnavailable) as error:
        print(f"tandem-front-end: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
