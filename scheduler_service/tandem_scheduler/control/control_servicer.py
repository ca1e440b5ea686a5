"""The RPCs with which an operator controls a running scheduler service, answered in the step loop's process."""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.duration_pb2 import Duration
from prometheus_client.registry import Collector

from tandem.v1 import control_pb2, control_pb2_grpc
from tandem_scheduler.engine.hub import EngineHub
from tandem_scheduler.front_end.validation import check_request_id
from tandem_shared.metrics.exposition import encode
from tandem_shared.step_codec import PROTOCOL_VERSION

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, hub: EngineHub, version: str, read_metrics: Callable[[], Collector]) -> None:
        """read_metrics: the metrics of now; their encoding, elsewhere, takes long."""
        self._hub = hub
        self._read_metrics = read_metrics
        self._version = version
        # Encoding takes milliseconds of the interpreter's time, so callers wait for each other.
        self._encoding = asyncio.Lock()
        self._started = time.monotonic()

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.GetServerInfoResponse:
        step_loop = self._hub.step_loop
        if step_loop.is_connected:
            state = control_pb2.WORKER_STATE_READY
        elif step_loop.worker is None:
            state = control_pb2.WORKER_STATE_CONNECTING
        else:
            state = control_pb2.WORKER_STATE_LOST
        uptime = Duration()
        uptime.FromMilliseconds(round((time.monotonic() - self._started) * 1000))
        return control_pb2.GetServerInfoResponse(
            version=self._version,
            protocol_version=PROTOCOL_VERSION,
            worker_state=state,
            uptime=uptime,
            draining=self._hub.is_draining,
        )

    async def GetLoad(self, request: control_pb2.GetLoadRequest, context: Context) -> control_pb2.GetLoadResponse:
        step_loop = self._hub.step_loop
        if step_loop.scheduler is None:
            return control_pb2.GetLoadResponse()
        values = dataclasses.asdict(step_loop.scheduler.load()) | dataclasses.asdict(step_loop.step_sums)
        return control_pb2.GetLoadResponse(block_size_tokens=values.pop("block_size"), **values)

    async def GetMetrics(
        self, request: control_pb2.GetMetricsRequest, context: Context
    ) -> control_pb2.GetMetricsResponse:
        async with self._encoding:
            text, content_type = await asyncio.to_thread(encode, self._read_metrics(), request.accept)
        return control_pb2.GetMetricsResponse(text=text, content_type=content_type)

    async def Abort(self, request: control_pb2.AbortRequest, context: Context) -> control_pb2.AbortResponse:
        check_request_id(request.request_id)
        self._hub.abort(request.request_id)
        return control_pb2.AbortResponse()

    async def Drain(self, request: control_pb2.DrainRequest, context: Context) -> control_pb2.DrainResponse:
        await self._hub.drain()
        return control_pb2.DrainResponse()

    async def Undrain(self, request: control_pb2.UndrainRequest, context: Context) -> control_pb2.UndrainResponse:
        await self._hub.undrain()
        return control_pb2.UndrainResponse()

    async def ResetPrefixCache(
        self, request: control_pb2.ResetPrefixCacheRequest, context: Context
    ) -> control_pb2.ResetPrefixCacheResponse:
        scheduler = self._hub.step_loop.scheduler
        count = scheduler.reset_prefix_cache() if scheduler is not None else 0
        return control_pb2.ResetPrefixCacheResponse(num_forgotten_blocks=count)
