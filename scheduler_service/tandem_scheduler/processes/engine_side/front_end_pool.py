"""The pool of front-end processes: starts them, replaces one that ends, kills one that is silent, tells them to leave.

The processes share a port and find the engine at a Unix domain socket in a private folder. The pool knows no request.
"""

import asyncio
import contextlib
import logging
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import grpc

from tandem.internal.v1 import engine_pb2_grpc
from tandem.v1 import control_pb2_grpc
from tandem_scheduler.engine.hub import EngineHub
from tandem_scheduler.engine_interface import HEARTBEAT_S
from tandem_scheduler.processes.engine_side.engine_servicer import EngineServicer
from tandem_scheduler.processes.front_end_side.front_end_process import FrontEndSettings
from tandem_shared.config import SchedulerSettings
from tandem_shared.errors import ConfigError
from tandem_shared.host.private_folder import PrivateFolder
from tandem_shared.host.process import child_environment
from tandem_shared.host.shared_port import SharedPort
from tandem_shared.options import to_arguments
from tandem_shared.rpc.error_interceptor import ErrorInterceptor
from tandem_shared.rpc.grpc_options import LOCAL_OPTIONS

MODULE = "tandem_scheduler.processes.front_end_side.front_end_process"
MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 5.0
STOP_TIMEOUT_S = 5.0
KILL_TIMEOUT_S = 5.0
PF_EXITING = 0x4
"""The flag of a process that has begun to end. Linux sets it before closing its files (include/linux/sched.h)."""
START_LIMIT_S = 60.0
"""A front end that does not listen after this time is killed. It reads a tokenizer, which takes a second or two."""
SILENCE_LIMIT_S = 10.0
"""A front end that has listened and then says nothing for this time is killed: it is stopped, or its event loop is
blocked for good, and the connections that the kernel gives to it are lost. It speaks every second from its event loop.
Garbage collection or a long message delays that by far less, and what runs in its threads (the tokenizer) not at
all."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _FrontEnd:
    process: asyncio.subprocess.Process
    is_listening: bool = False
    # Counted in turns of this event loop, because messages don't arrive while this process itself stands still.
    silent_s: float = 0.0

    @property
    def is_lost(self) -> bool:
        return self.silent_s > (SILENCE_LIMIT_S if self.is_listening else START_LIMIT_S)


class FrontEndPool:
    def __init__(
        self,
        settings: SchedulerSettings,
        tokenizer_folder: Path,
        hub: EngineHub,
        control: control_pb2_grpc.ControlServiceServicer,
        count: int,
    ) -> None:
        if sys.platform != "linux":
            raise ConfigError("--api-server-count must be 0 on this system: only Linux shares a port as it needs")
        self._settings = settings
        self._tokenizer_folder = tokenizer_folder
        self._count = count
        self._listening = asyncio.Semaphore(0)
        self._engine = EngineServicer(hub, self._on_alive, has_ended)
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=LOCAL_OPTIONS)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self._engine, self._server)
        control_pb2_grpc.add_ControlServiceServicer_to_server(control, self._server)
        # By process id.
        self._front_ends: dict[int, _FrontEnd] = {}
        self._has_started = False
        self._cleanup = contextlib.ExitStack()
        self._keepers: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Returns the port once all front ends listen on it. Raises ConfigError if one can't."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """The front-end processes end the calls that are left, and leave; those that don't are killed."""
        tasks = [*self._keepers, *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._engine.close()
        waits = [asyncio.create_task(each.process.wait()) for each in self._front_ends.values()]
        if waits:
            await asyncio.wait(waits, timeout=STOP_TIMEOUT_S)
            for each in self._front_ends.values():
                if each.process.returncode is None:
                    each.process.kill()
            _, left = await asyncio.wait(waits, timeout=KILL_TIMEOUT_S)
            if left:
                logger.error("%d front-end processes do not end, even killed", len(left))
        await self._server.stop(0)
        self._cleanup.close()

    async def _start(self) -> int:
        port = SharedPort(self._settings.host, self._settings.port)
        self._cleanup.callback(port.close)
        # Its mode is 0700: nobody else reaches the socket.
        folder = self._cleanup.enter_context(PrivateFolder())
        socket_path = f"{folder}/engine.sock"
        try:
            self._server.add_insecure_port(f"unix:{socket_path}")
        except RuntimeError as error:
            raise ConfigError(f"can't listen on {socket_path}: {error}") from error
        await self._server.start()
        command = self._command(port.port, socket_path)
        self._watching = asyncio.create_task(self._watch())
        self._keepers = [asyncio.create_task(self._keep(command)) for _ in range(self._count)]
        all_listen = asyncio.create_task(self._wait_listening())
        try:
            done, _ = await asyncio.wait([*self._keepers, all_listen], return_when=asyncio.FIRST_COMPLETED)
        finally:
            all_listen.cancel()
        done.pop().result()
        self._has_started = True
        logger.info("%d front ends listen on %s:%d", self._count, self._settings.host, port.port)
        return port.port

    async def _wait_listening(self) -> None:
        for _ in range(self._count):
            await self._listening.acquire()

    def _on_alive(self, process_id: int) -> None:
        front_end = self._front_ends.get(process_id)
        # A message may come from a process that is being killed.
        if front_end is None:
            return
        front_end.silent_s = 0.0
        if not front_end.is_listening:
            front_end.is_listening = True
            self._listening.release()

    async def _watch(self) -> None:
        """Tells the front ends that this process is alive, and kills those that are silent; _keep() replaces them."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                self._beat()
            except Exception:
                # The watch goes on: without it the front ends would take this process for dead.
                logger.exception("a look at the front ends failed")

    def _beat(self) -> None:
        self._engine.say_alive()
        for process_id, front_end in self._front_ends.items():
            front_end.silent_s += HEARTBEAT_S
            if front_end.is_lost and front_end.process.returncode is None:
                logger.error("front-end process %d is silent; killing it", process_id)
                front_end.process.kill()

    async def _keep(self, command: list[str]) -> None:
        """Runs a front end, and another one whenever it ends."""
        environment = child_environment()
        backoff_s = MIN_BACKOFF_S
        while True:
            started = time.monotonic()
            end = await self._run_one(command, environment)
            if not self._has_started:
                raise ConfigError(f"a front-end process {end} before it listened")
            logger.warning("a front-end process %s; starting another", end)
            lived_long = time.monotonic() - started > 2 * MAX_BACKOFF_S
            backoff_s = MIN_BACKOFF_S if lived_long else min(2 * backoff_s, MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s)

    async def _run_one(self, command: list[str], environment: dict[str, str]) -> str:
        """Starts a front end and waits for its end. Returns how it ended, in words."""
        try:
            process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, env=environment)
        except (OSError, RuntimeError) as error:
            # Memory, processes, threads or files may be short for the moment.
            return f"could not be started ({error})"
        self._front_ends[process.pid] = _FrontEnd(process)
        status = await process.wait()
        del self._front_ends[process.pid]
        return f"ended with status {status}"

    def _command(self, port: int, socket_path: str) -> list[str]:
        values = {field.name: getattr(self._settings, field.name) for field in fields(SchedulerSettings)}
        values |= {"port": port, "port_file": "", "record": "", "tokenizer": str(self._tokenizer_folder)}
        settings = FrontEndSettings(**values, engine_socket=socket_path, parent_pid=os.getpid())
        return [sys.executable, "-m", MODULE, *to_arguments(settings)]


def has_ended(process_id: int) -> bool:
    """Whether a child process has begun to end. Its connections close some time before its end can be waited for."""
    try:
        if os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        status = Path(f"/proc/{process_id}/stat").read_bytes()
    except (ChildProcessError, ProcessLookupError, FileNotFoundError):
        return True
    except (OSError, OverflowError):
        # The number is not a process id, or the system has no /proc.
        return False
    # The fields after the name, which may hold anything but ends with the last parenthesis; the seventh are the flags.
    return bool(int(status.rpartition(b")")[2].split()[6]) & PF_EXITING)
