"""Puts the scheduler service together: tokenizer, front end, step loop, server."""

import asyncio
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path

import grpc

from scheduler_service import control_servicer, servicer
from scheduler_service.core.scheduler import Scheduler
from scheduler_service.core.types import SchedulerConfig
from scheduler_service.front_end import FrontEnd
from scheduler_service.recorder import RecordingScheduler
from scheduler_service.step_loop import StepLoop
from scheduler_service.tokenizer import load_tokenizer
from scheduler_service.worker_client import GrpcWorkerClient, WorkerClient
from shared import VERSION
from shared.config import SchedulerSettings, model_name
from shared.errors import WorkerUnavailable
from shared.model_folder import TOKENIZER_FILES, resolve_model
from shared.server import Server, read_pem, server_credentials
from shared.step_plan import WorkerInfo
from tandem.v1 import control_pb2_grpc, inference_pb2_grpc

logger = logging.getLogger(__name__)


class SchedulerService:
    """The whole service, without the process around it."""

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        client: WorkerClient | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        """Raises ConfigError and ModelError. `client` stands for the worker at settings.worker_address."""
        self._settings = settings
        self._client = client or GrpcWorkerClient(settings.worker_address, _worker_credentials(settings))
        self._recorder: RecordingScheduler | None = None
        tokenizer = load_tokenizer(resolve_model(settings.tokenizer or settings.model, TOKENIZER_FILES))
        self.front_end = FrontEnd(tokenizer, self._set_ready)
        self.step_loop = StepLoop(
            self._client,
            _core_config(settings),
            self.front_end,
            scheduler_id=uuid.uuid4().hex,
            worker_wait_s=settings.worker_wait_s,
            step_timeout_s=settings.step_timeout_s,
            create_scheduler=self._create_scheduler,
        )
        self.front_end.connect(self.step_loop)
        inference = servicer.InferenceServicer(self.front_end, model_name(settings))
        control = control_servicer.ControlServicer(self.front_end, model_name(settings), VERSION)
        self._server = Server(
            {
                servicer.SERVICE_NAME: lambda s: inference_pb2_grpc.add_InferenceServiceServicer_to_server(
                    inference, s
                ),
                control_servicer.SERVICE_NAME: lambda s: control_pb2_grpc.add_ControlServiceServicer_to_server(
                    control, s
                ),
            },
            interceptors=interceptors,
            credentials=server_credentials(settings),
        )
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listens and begins to look for the worker; gives the port."""
        port = await self._server.start(self._settings.host, self._settings.port)
        await self._server.set_ready([control_servicer.SERVICE_NAME], True)
        self._running = asyncio.create_task(self.step_loop.run())
        return port

    async def wait(self) -> None:
        """Returns only if the step loop fails, which is a bug: then raises why."""
        assert self._running is not None, "start() comes first"
        await asyncio.shield(self._running)

    async def stop(self, grace_s: float) -> None:
        """Takes no new requests; those that run have grace_s to end, then they end UNAVAILABLE."""
        try:
            async with asyncio.timeout(grace_s):
                await self.front_end.drain()
        except TimeoutError:
            self.front_end.end_all(WorkerUnavailable("the server is stopping"))
        await self._server.stop(1.0)
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self._client.close()
        if self._recorder is not None:
            self._recorder.close()

    async def _set_ready(self, is_ready: bool) -> None:
        await self._server.set_ready([servicer.SERVICE_NAME], is_ready)

    def _create_scheduler(self, config: SchedulerConfig, worker: WorkerInfo) -> Scheduler:
        if not self._settings.record:
            return Scheduler(config, worker)
        self._recorder = RecordingScheduler(config, worker, Path(self._settings.record))
        return self._recorder


def _core_config(settings: SchedulerSettings) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_chunk_tokens=settings.max_chunk_tokens,
        max_plans_in_flight=settings.max_plans_in_flight,
        max_num_waiting=settings.max_num_waiting,
        enable_prefix_caching=settings.enable_prefix_caching,
    )


def _worker_credentials(settings: SchedulerSettings) -> grpc.ChannelCredentials | None:
    return grpc.ssl_channel_credentials(read_pem("--worker-ca", settings.worker_ca)) if settings.worker_ca else None
