"""tandem-scheduler: the scheduler service as a process."""

import asyncio
import logging
import sys

from tandem_shared.config import SchedulerSettings, read_command_line
from tandem_shared.errors import ConfigError, ModelError
from tandem_shared.host.log import configure_logging
from tandem_shared.host.process import leave, write_port_file
from tandem_shared.host.progress import Progress

logger = logging.getLogger(__name__)


async def serve(settings: SchedulerSettings) -> None:
    with Progress("starting the scheduler"):
        # Imported once main() has made sure that the packages of the extra are there.
        from tandem_scheduler.service import SchedulerService
        from tandem_shared.rpc.server import StopSignals

        service = SchedulerService(settings, ends_process=True)
        signals = StopSignals()
        stopped = asyncio.create_task(signals.first.wait())
        starting = asyncio.create_task(service.start())
        await asyncio.wait([stopped, starting], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    write_port_file(settings.port_file, starting.result())
    failed = asyncio.create_task(service.wait())
    await asyncio.wait([stopped, failed], return_when=asyncio.FIRST_COMPLETED)
    logger.info("stopping")
    await service.stop(settings.drain_grace_s, signals.second)
    has_failed = failed.done() and not failed.cancelled()
    if has_failed:
        logger.critical("the step loop failed", exc_info=failed.exception())
    leave(int(has_failed))


def main() -> None:
    settings = read_command_line(
        SchedulerSettings, "tandem-scheduler", "Schedules requests onto a worker service.", extra="scheduler"
    )
    configure_logging(settings.log_level, settings.log_format, "scheduler")
    try:
        asyncio.run(serve(settings))
    except (ConfigError, ModelError) as error:
        print(f"tandem-scheduler: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
