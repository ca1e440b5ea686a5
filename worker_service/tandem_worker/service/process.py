"""The worker service as a process: rank 0 serves gRPC, other ranks follow its plans.

tandem-worker (__main__.py) keeps such a process running; a rank that a launcher has started is one itself.
"""

import asyncio
import faulthandler
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from tandem_shared.config import WorkerSettings, read_command_line
from tandem_shared.errors import ConfigError, ModelError
from tandem_shared.host.log import configure_logging
from tandem_shared.host.process import leave, write_port_file
from tandem_shared.host.progress import Progress, say_no_progress
from tandem_shared.host.supervisor import tell_supervisor
from tandem_shared.metrics.server import MetricsServer
from tandem_shared.rpc.credentials import server_credentials
from tandem_shared.rpc.server import Server, StopSignals
from tandem_shared.rpc.session_secret import SecretInterceptor, read_secret
from tandem_worker import PARENT_PID
from tandem_worker.service.servicer import LAST_WORD_GRACE_S, SERVICE_NAME, WorkerServicer

logger = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
"""The longest time that calls go on once the service has been told to stop."""
STEP_GRACE_S = 5.0
"""The longest time that steps go on after that."""
EXIT_BROKEN = 70
"""The exit status of a worker in which a step has failed: another one should be started."""
SWITCH_INTERVAL_S = 2e-4
"""Python's switch interval: short, so that launching a step does not hold up the result of the step before it."""


async def serve(settings: WorkerSettings, servicer: WorkerServicer, secret: bytes = b"") -> None:
    """Serves until a signal asks it to stop, or a step fails: then this exits the process. secret: what callers must
    show, if it is not empty.
    """
    server = Server(
        {SERVICE_NAME: servicer.add_to},
        interceptors=[SecretInterceptor(secret)] if secret else [],
        credentials=server_credentials(settings),
        health_port=settings.health_port,
    )
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    signals = StopSignals()
    if settings.metrics_port is not None:
        MetricsServer(lambda: servicer.read_metrics(settings.metrics_prefix)).start(
            settings.host, settings.metrics_port
        )
    port = await server.start(settings.host, settings.port)
    await server.set_ready([SERVICE_NAME], True)
    write_port_file(settings.port_file, port)
    tell_supervisor(port)
    stopping = asyncio.create_task(signals.first.wait())
    failing = asyncio.create_task(servicer.run_until_failure(lambda: server.set_ready([SERVICE_NAME], False)))
    await asyncio.wait([stopping, failing], return_when=asyncio.FIRST_COMPLETED)
    if failing.done():
        await server.stop(2 * LAST_WORD_GRACE_S)
        # The log gets the stacks of all threads, to find the fault by, and then the reason as its last line.
        faulthandler.dump_traceback()
        _exit(f"the worker ends: {failing.result()}", EXIT_BROKEN)
    failing.cancel()
    logger.info("stopping")
    await server.stop(STOP_GRACE_S)
    if not await servicer.close(STEP_GRACE_S):
        _exit(f"a step has not ended in {STEP_GRACE_S:.0f} s", 1)


def _exit(reason: str, status: int) -> NoReturn:
    """Ends the process at once: a thread hangs, or a device is broken, so that nothing can be ended in order."""
    logger.critical("%s", reason)
    leave(status)


def run(settings: WorkerSettings, make_servicer: Callable[..., WorkerServicer] = WorkerServicer) -> None:
    """Serves a model, or as one of several ranks a part of it, until the end. Raises ConfigError and ModelError."""
    secret = read_secret(settings.session_secret_file)
    # torch is imported only now, so that --help and wrong flags answer at once.
    with Progress("loading torch"):
        from tandem_worker.startup import build_runner, check_model

    world_size = os.environ.get("WORLD_SIZE") if "RANK" in os.environ else None
    if world_size not in (None, str(settings.tp_size)):
        raise ConfigError(f"--tp-size is {settings.tp_size}, but WORLD_SIZE is {world_size}")
    if settings.tp_size == 1:
        servicer = make_servicer(build_runner(settings), step_timeout_s=settings.step_timeout_s)
        asyncio.run(serve(settings, servicer, secret))
        return
    from tandem_worker.ranks.communicator import Communicator
    from tandem_worker.ranks.group_failure import tell_failures
    from tandem_worker.ranks.plan_channel import STOP, Follower, Leader, LeadingRunner
    from tandem_worker.ranks.rank_group import join_group, leave_group

    # A model that is refused is refused once, before there are other ranks.
    check_model(settings)
    with Progress("waiting for the other ranks"):
        rank = join_group(settings, PARENT_PID)
    communicator = Communicator(rank.shard)
    if rank.shard.rank > 0:
        say_no_progress()
        follower, runner = Follower(rank), build_runner(settings, communicator)
        follower.run(runner)
        leave_group(runner)
        return
    leader = Leader(rank)
    leading_runner = LeadingRunner(build_runner(settings, communicator), leader)
    try:
        servicer = make_servicer(leading_runner, step_timeout_s=settings.step_timeout_s)
        tell_failures(servicer.fail_from_thread)
        asyncio.run(serve(settings, servicer, secret))
    finally:
        leader.send(STOP)
        leave_group(leading_runner)
        leader.join()


def run_and_exit(settings: WorkerSettings) -> NoReturn:
    """Calls run(), then exits: with status 2 and a message where the settings or the model are wrong."""
    try:
        run(settings)
    except (ConfigError, ModelError) as error:
        print(f"tandem-worker: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _name_in_log() -> str:
    rank = os.environ.get("RANK")
    return "worker" if rank is None else f"worker rank {rank}"


def main() -> None:
    settings = read_command_line(WorkerSettings, "tandem-worker", "Runs a Qwen3 model for a scheduler service.")
    configure_logging(settings.log_level, settings.log_format, _name_in_log())
    run_and_exit(settings)


if __name__ == "__main__":
    main()
