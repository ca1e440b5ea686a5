"""Puts the scheduler service together: step loop, hub, and the front ends, in this process or in their own ones."""

import asyncio
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import grpc

from tandem_scheduler.control.audit import audited
from tandem_scheduler.control.control_servicer import ControlServicer
from tandem_scheduler.core.interface import SchedulerInterface
from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import SchedulerConfig
from tandem_scheduler.engine.hub import EngineHub
from tandem_scheduler.engine.observer import Observer, all_of
from tandem_scheduler.engine.recorder import RecordingScheduler
from tandem_scheduler.engine.step_loop import StepLoop
from tandem_scheduler.engine.worker_client import GrpcWorkerClient, WorkerClient
from tandem_scheduler.front_end.grpc_api.public_server import PublicServer
from tandem_scheduler.model_check import ModelCheck
from tandem_scheduler.observers.load_log import log_load
from tandem_scheduler.observers.load_report import LoadReports
from tandem_scheduler.observers.metrics import SchedulerMetrics
from tandem_scheduler.observers.request_log import RequestLog
from tandem_scheduler.processes.engine_side.front_end_pool import FrontEndPool
from tandem_shared import VERSION
from tandem_shared.config import SchedulerSettings, model_name
from tandem_shared.errors import ConfigError, WorkerUnavailable
from tandem_shared.extras import require_extra
from tandem_shared.host.reloaded import Reloaded
from tandem_shared.metrics.exposition import Samples
from tandem_shared.metrics.server import MetricsServer
from tandem_shared.model_folder import TOKENIZER_FILES, resolve_model
from tandem_shared.rpc.credentials import reloaded_credentials
from tandem_shared.rpc.session_secret import read_secret
from tandem_shared.step_plan import WorkerInfo
from tandem_shared.tracing import SpanExport

MIN_CPUS_FOR_PROCESSES = 8
CPUS_PER_FRONT_END = 4
MAX_DEFAULT_FRONT_ENDS = 4


class FrontEnds(Protocol):
    """All front ends of the service: one in this process, or a pool of processes."""

    async def start(self) -> int:
        """Listens. Returns the port."""

    async def stop(self) -> None:
        """Ends the calls that are left, whose requests have ended."""


class SchedulerService:
    """The whole service, without the process around it."""

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        client: WorkerClient | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        observer: Observer | None = None,
        ends_process: bool = False,
    ) -> None:
        """Raises ConfigError and ModelError.

        client: takes the place of a client of the worker at settings.worker_address. interceptors: run in this process
        alone, so with them there are no front-end processes. observer: is called with the events of engine/observer.py,
        in the event loop. ends_process: the caller ends the process after stop(), and its connections with it, so that
        they need not be closed.
        """
        self._settings = settings
        self._ends_process = ends_process
        self._client = client or GrpcWorkerClient(
            settings.worker_address,
            worker_credentials(settings),
            secret=read_secret(settings.session_secret_file),
        )
        self._recorder: RecordingScheduler | None = None
        self._metrics = SchedulerMetrics()
        self._metrics_server = MetricsServer(self.read_metrics)
        self.metrics_port: int | None = None
        """The port of the metrics, once it listens, if there is to be one."""
        self._request_log = RequestLog(is_limited=settings.log_requests == "few")
        told = [self._metrics.tell, *([observer] if observer is not None else [])]
        if settings.log_requests != "none":
            told.append(self._request_log.tell)
        reports = LoadReports()
        if settings.load_reports:
            told.append(reports.tell)
        self._span_export = SpanExport(settings.otlp_traces_endpoint) if settings.otlp_traces_endpoint else None
        if self._span_export is not None:
            # It needs an extra.
            from tandem_scheduler.observers.traces import RequestTraces

            traces = RequestTraces(self._span_export, model_name(settings), self._metrics.times)
            # It reads times that the metrics forget at the end of a call.
            told.insert(0, traces.tell)
        observe = all_of(*told)
        self._hub = EngineHub(observe)
        self._tokenizer_folder = _tokenizer_folder(settings)
        self.step_loop = StepLoop(
            self._client,
            _core_config(settings),
            self._hub,
            scheduler_id=uuid.uuid4().hex,
            worker_wait_s=settings.worker_wait_s,
            step_timeout_s=settings.step_timeout_s,
            create_scheduler=self._create_scheduler,
            check_worker=ModelCheck(settings, self._tokenizer_folder),
            observer=observe,
        )
        self._hub.connect(self.step_loop)
        if settings.load_reports:
            self._hub.load_report = lambda: reports.read(self.step_loop)
        self._front_ends = self._create_front_ends(interceptors)
        self._running: asyncio.Task[None] | None = None
        self._logging: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listens and begins to look for the worker. Returns the port."""
        settings = self._settings
        if settings.metrics_port is not None:
            self.metrics_port = self._metrics_server.start(settings.host, settings.metrics_port)
        try:
            port = await self._front_ends.start()
        except BaseException:
            await asyncio.to_thread(self._metrics_server.stop)
            raise
        self._running = asyncio.create_task(self.step_loop.run())
        self._logging = asyncio.create_task(log_load(self.step_loop, self._request_log.flush))
        return port

    def read_metrics(self) -> Samples:
        """The metrics of now. To be called in the event loop."""
        return self._metrics.read(self._hub, self._settings.metrics_prefix, model_name(self._settings))

    async def wait(self) -> None:
        """Returns only if the step loop fails, which is a bug: then raises why."""
        assert self._running is not None, "start() comes first"
        await asyncio.shield(self._running)

    async def stop(self, grace_s: float, hurry: asyncio.Event | None = None) -> None:
        """Takes no new requests. Running ones have grace_s to end, or less if `hurry` is set meanwhile; then they end
        UNAVAILABLE.
        """
        drained = asyncio.create_task(self._hub.drain_for_good())
        hurried = asyncio.create_task((hurry or asyncio.Event()).wait())
        await asyncio.wait([drained, hurried], timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if drained.done():
            drained.result()
        else:
            drained.cancel()
            self._hub.end_all(WorkerUnavailable("the server is stopping"))
        await self._front_ends.stop()
        tasks = [task for task in (self._running, self._logging) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()
        await asyncio.to_thread(self._metrics_server.stop)
        if self._recorder is not None:
            self._recorder.close()
        if self._span_export is not None:
            await asyncio.to_thread(self._span_export.close)

    def _create_front_ends(self, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> FrontEnds:
        settings = self._settings
        if settings.vllm_engine_service:
            require_extra("smg")
        control = ControlServicer(self._hub, VERSION, self.read_metrics)
        count = settings.api_server_count
        if count is None:
            count = 0 if interceptors else default_num_front_ends()
        if count == 0:
            return PublicServer(
                settings,
                self._tokenizer_folder,
                self._hub.attach,
                audited(control),
                interceptors=interceptors,
                ends_process=self._ends_process,
            )
        if interceptors:
            raise ConfigError("interceptors need --api-server-count 0")
        return FrontEndPool(settings, self._tokenizer_folder, self._hub, control, count)

    def _create_scheduler(self, config: SchedulerConfig, worker: WorkerInfo) -> SchedulerInterface:
        if not self._settings.record:
            return Scheduler(config, worker)
        self._recorder = RecordingScheduler(config, worker, Path(self._settings.record))
        return self._recorder


def default_num_front_ends() -> int:
    """The number of front-end processes by default: 0 if CPUs are few or a port can't be shared."""
    if sys.platform != "linux":
        return 0
    num_cpus = len(os.sched_getaffinity(0))
    return 0 if num_cpus < MIN_CPUS_FOR_PROCESSES else min(num_cpus // CPUS_PER_FRONT_END, MAX_DEFAULT_FRONT_ENDS)


def _tokenizer_folder(settings: SchedulerSettings) -> Path:
    if settings.tokenizer:
        return resolve_model(settings.tokenizer, TOKENIZER_FILES)
    return resolve_model(settings.model, TOKENIZER_FILES, settings.revision)


def _core_config(settings: SchedulerSettings) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_chunk_tokens=settings.max_chunk_tokens,
        max_plans_in_flight=settings.max_plans_in_flight,
        max_num_waiting=settings.max_num_waiting,
        max_num_waiting_tokens=settings.max_num_waiting_tokens,
        enable_prefix_caching=settings.enable_prefix_caching,
    )


def worker_credentials(settings: SchedulerSettings) -> Reloaded[grpc.ChannelCredentials] | None:
    """Credentials for TLS to the worker, with the scheduler's own certificate if it has one. None without TLS."""
    if not settings.worker_ca:
        return None
    return reloaded_credentials(
        ("--worker-ca", settings.worker_ca),
        ("--worker-tls-key", settings.worker_tls_key),
        ("--worker-tls-cert", settings.worker_tls_cert),
    )
