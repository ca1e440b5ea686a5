"""The service vllm.grpc.engine.VllmEngine, through which the gateway SMG uses Tandem as it uses vLLM. The gateway has
the tokenizer and the chat template, and spreads requests over many servers; Tandem gets token ids and gives token ids.

RPCs that are left out end with UNIMPLEMENTED: Embed, the profiler's, and SubscribeKvEvents, without which the gateway
keeps its own account of the prefixes that each server has seen.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from smg_grpc_proto import vllm_engine_pb2
from smg_grpc_proto.generated import common_pb2

from tandem.v1 import control_pb2
from tandem_scheduler.front_end.front_end import FrontEnd, closing, counting_refusals
from tandem_scheduler.front_end.grpc_api.caller_limits import for_caller
from tandem_scheduler.front_end.grpc_api.request_codec import deadline_of, reply_limit, trace_of
from tandem_scheduler.front_end.grpc_api.tokenizer_bundle import CHUNK_BYTES, tokenizer_bundle
from tandem_scheduler.front_end.grpc_api.vllm_engine_codec import VllmReplies, bounded_vllm_generate, vllm_params_of
from tandem_scheduler.front_end.grpc_api.wire_limits import TooLargeToDecode
from tandem_scheduler.front_end.validation import check_request
from tandem_shared import VERSION
from tandem_shared.config import SchedulerSettings, model_name
from tandem_shared.errors import RequestNotFound
from tandem_shared.model_folder import read_json
from tandem_shared.rpc.api_keys import Scope

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Message: TypeAlias = Any
"""A message of smg-grpc-proto, which has no types."""

SERVICE_NAME = "vllm.grpc.engine.VllmEngine"

SMALL_METHODS = ("HealthCheck", "FlushCache", "Abort", "GetModelInfo", "GetServerInfo", "GetLoads", "GetTokenizer")
"""All methods but Generate. Their requests are small."""

SCOPES = {
    "HealthCheck": None,
    **dict.fromkeys(("Generate", "GetModelInfo", "GetTokenizer"), Scope.INFERENCE),
    **dict.fromkeys(("Abort", "FlushCache", "GetServerInfo", "GetLoads"), Scope.CONTROL),
}
"""What an API key must be for to call a method. None is for any caller: HealthCheck tells no more than the standard
health service."""

MIN_RATE_INTERVAL_S = 1.0
"""The shortest time over which the rate of generated tokens is told."""


class VllmEngineServicer:
    """The RPCs of VllmEngine. They are registered with add_to(), because requests are measured before they are decoded.

    control: a servicer of ControlService, to which the RPCs that concern the whole engine go.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        control: Any,
        settings: SchedulerSettings,
        tokenizer_folder: Path,
        token_limit: Callable[[], int],
    ) -> None:
        """token_limit gives how many ids a prompt may have to be decoded. Raises ModelError for a config.json that
        can't be read.
        """
        self._front_end = front_end
        self._control = control
        self._settings = settings
        self._tokenizer_folder = tokenizer_folder
        self._token_limit = token_limit
        self._model_config = read_json(tokenizer_folder / "config.json", is_optional=True)
        self._bundle: tuple[bytes, str] | None = None
        self._making_bundle = asyncio.Lock()
        self._started = time.monotonic()
        self._rate = _Rate()

    def add_to(self, server: grpc.aio.Server) -> None:
        pb, unary = vllm_engine_pb2, grpc.unary_unary_rpc_method_handler
        generate = bounded_vllm_generate(pb.GenerateRequest.FromString, self._token_limit)
        handlers: dict[str, Any] = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.Generate, generate, pb.GenerateResponse.SerializeToString
            ),
            "GetTokenizer": grpc.unary_stream_rpc_method_handler(
                self.GetTokenizer,
                common_pb2.GetTokenizerRequest.FromString,
                common_pb2.GetTokenizerChunk.SerializeToString,
            ),
            "FlushCache": unary(
                self.FlushCache,
                common_pb2.FlushCacheRequest.FromString,
                common_pb2.FlushCacheResponse.SerializeToString,
            ),
        }
        for name in ("HealthCheck", "Abort", "GetModelInfo", "GetServerInfo", "GetLoads"):
            request, response = getattr(pb, f"{name}Request"), getattr(pb, f"{name}Response")
            handlers[name] = unary(getattr(self, name), request.FromString, response.SerializeToString)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))

    async def Generate(self, request: Message | TooLargeToDecode, context: Context) -> AsyncIterator[Message]:
        front_end, limit, arrived_at = self._front_end, reply_limit(context.invocation_metadata()), time.monotonic()
        with counting_refusals(front_end):
            if isinstance(request, TooLargeToDecode):
                raise request.error
            front_end.refuse_if_draining()
            params = for_caller(vllm_params_of(request, limit, deadline_of(context)))
            checked = await check_request(
                params, front_end.encoder, front_end.worker, model_name(self._settings), front_end.grammars
            )
            trace = trace_of(context, f"{SERVICE_NAME}/Generate") if front_end.has_traces else None
            live = await front_end.open(checked, arrived_at, trace)
        with closing(live):
            replies = VllmReplies(live, request, limit)
            async for delta in live.deltas():
                for message in await replies.of(delta):
                    yield message

    async def HealthCheck(self, request: Message, context: Context) -> Message:
        state = self._front_end.engine.state
        message = "the server is draining" if state.is_draining else "" if state.is_ready else "there is no worker"
        return vllm_engine_pb2.HealthCheckResponse(healthy=not message, message=message or "ready")

    async def Abort(self, request: Message, context: Context) -> Message:
        """Requests that have ended are no error: the gateway aborts whatever it has not read to the end."""
        for request_id in request.request_ids:
            try:
                await self._control.Abort(control_pb2.AbortRequest(request_id=request_id), context)
            except RequestNotFound:
                continue
        return vllm_engine_pb2.AbortResponse()

    async def FlushCache(self, request: Message, context: Context) -> Message:
        """Forgets the cached prefixes that no running sequence uses, without waiting."""
        reply = await self._control.ResetPrefixCache(control_pb2.ResetPrefixCacheRequest(), context)
        return common_pb2.FlushCacheResponse(success=True, message=f"{reply.num_forgotten_blocks} blocks")

    async def GetModelInfo(self, request: Message, context: Context) -> Message:
        worker, config = self._front_end.worker, self._model_config
        defaults = worker.sampling_defaults
        return vllm_engine_pb2.GetModelInfoResponse(
            model_path=self._settings.model,
            served_model_name=model_name(self._settings),
            is_generation=True,
            max_context_length=worker.max_model_len,
            max_req_input_len=worker.max_model_len,
            vocab_size=worker.vocab_size,
            eos_token_ids=worker.eos_token_ids,
            model_type=config.get("model_type", ""),
            architectures=config.get("architectures", []),
            pad_token_id=config.get("pad_token_id") or 0,
            bos_token_id=config.get("bos_token_id") or 0,
            default_sampling_params_json=json.dumps(dict(defaults)) if defaults else "",
        )

    async def GetServerInfo(self, request: Message, context: Context) -> Message:
        load = await self._control.GetLoad(control_pb2.GetLoadRequest(), context)
        return vllm_engine_pb2.GetServerInfoResponse(
            active_requests=load.num_running_sequences + load.num_waiting_sequences,
            is_paused=self._front_end.engine.state.is_draining,
            uptime_seconds=time.monotonic() - self._started,
            server_type="vllm-grpc",
            data_parallel_size=1,
            block_size=load.block_size_tokens,
            model_dtype=self._front_end.worker.dtype,
            max_num_seqs=self._settings.max_num_seqs,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: Message, context: Context) -> Message:
        load = await self._control.GetLoad(control_pb2.GetLoadRequest(), context)
        use = load.num_used_blocks / load.num_total_blocks if load.num_total_blocks else 0.0
        hit_rate = load.num_cached_prompt_tokens / max(load.num_admitted_prompt_tokens, 1)
        return vllm_engine_pb2.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=VERSION,
            dp_rank_count=1,
            loads=[
                vllm_engine_pb2.SchedulerLoad(
                    num_running_reqs=load.num_running_sequences,
                    num_waiting_reqs=load.num_waiting_sequences,
                    num_total_reqs=load.num_running_sequences + load.num_waiting_sequences,
                    num_used_tokens=load.num_used_blocks * load.block_size_tokens,
                    max_total_num_tokens=load.num_total_blocks * load.block_size_tokens,
                    token_usage=use,
                    utilization=use,
                    gen_throughput=self._rate.update(load.num_output_tokens, time.monotonic()),
                    cache_hit_rate=hit_rate,
                    max_running_requests=self._settings.max_num_seqs,
                )
            ],
        )

    async def GetTokenizer(self, request: Message, context: Context) -> AsyncIterator[Message]:
        """The bundle in pieces, the last of which has its digest."""
        async with self._making_bundle:
            if self._bundle is None:
                self._bundle = await asyncio.to_thread(tokenizer_bundle, self._tokenizer_folder)
        contents, digest = self._bundle
        for start in range(0, len(contents), CHUNK_BYTES):
            is_last = start + CHUNK_BYTES >= len(contents)
            data = contents[start : start + CHUNK_BYTES]
            yield common_pb2.GetTokenizerChunk(data=data, sha256=digest if is_last else "")


class _Rate:
    """The rate of a count that only grows, between two looks at it."""

    def __init__(self) -> None:
        self._time = self._count = self._rate = 0.0

    def update(self, count: float, now: float) -> float:
        """The rate, in 1/s, since the last look that was MIN_RATE_INTERVAL_S or more ago. now: seconds of a clock that
        does not go back.
        """
        elapsed = now - self._time
        if elapsed >= MIN_RATE_INTERVAL_S:
            if self._time:
                self._rate = max(0.0, count - self._count) / elapsed
            self._time, self._count = now, count
        return self._rate
