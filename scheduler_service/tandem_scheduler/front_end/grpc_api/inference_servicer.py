"""The public inference RPCs: validate, submit, stream. A cancelled call aborts its request."""

import time
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc

from tandem.v1 import inference_pb2
from tandem_scheduler.front_end.front_end import FrontEnd, closing, counting_refusals
from tandem_scheduler.front_end.grpc_api.caller_limits import for_caller
from tandem_scheduler.front_end.grpc_api.reply_codec import stream_message, whole_reply
from tandem_scheduler.front_end.grpc_api.request_codec import (
    AnyGenerateRequest,
    chat_of,
    deadline_of,
    params_of,
    reply_limit,
    trace_of,
)
from tandem_scheduler.front_end.grpc_api.wire_limits import (
    TooLargeToDecode,
    bounded_detokenize,
    bounded_generate,
    bounded_tokenize,
)
from tandem_scheduler.front_end.list_checks import check_token_ids
from tandem_scheduler.front_end.live_request import LiveRequest, reply_too_large
from tandem_scheduler.front_end.text.tokenizer_faults import text_failure
from tandem_scheduler.front_end.validation import check_model, check_request
from tandem_shared.errors import FieldViolation, InvalidRequest

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

SERVICE_NAME = "tandem.v1.InferenceService"

LOAD_REPORT_KEY = "endpoint-load-metrics-bin"
"""The metadata of ORCA's load reports."""

MIN_TOKEN_LIMIT = 131_072
"""The most tokens that Tokenize returns and Detokenize accepts, unless the model's context is longer."""


class InferenceServicer:
    """The RPCs of InferenceService. They are registered with add_to() instead of the generated function, because
    requests are measured before they are decoded, and whole replies come here encoded.
    """

    def __init__(self, front_end: FrontEnd, served_model: str) -> None:
        self._front_end = front_end
        self._served_model = served_model

    def add_to(self, server: grpc.aio.Server) -> None:
        pb = inference_pb2
        unary, streaming = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        generate = bounded_generate(pb.GenerateRequest.FromString, self.token_limit)
        generate_stream = bounded_generate(pb.GenerateStreamRequest.FromString, self.token_limit)
        detokenize = bounded_detokenize(pb.DetokenizeRequest.FromString, self.token_limit)
        tokenize = bounded_tokenize(pb.TokenizeRequest.FromString)
        encoded = pb.GenerateStreamResponse.SerializeToString
        handlers: dict[str, Any] = {
            "Generate": unary(self.Generate, generate, bytes),
            "GenerateStream": streaming(self.GenerateStream, generate_stream, encoded),
            "Tokenize": unary(self.Tokenize, tokenize, pb.TokenizeResponse.SerializeToString),
            "Detokenize": unary(self.Detokenize, detokenize, pb.DetokenizeResponse.SerializeToString),
            "GetModelInfo": unary(
                self.GetModelInfo, pb.GetModelInfoRequest.FromString, pb.GetModelInfoResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))

    async def Generate(self, request: inference_pb2.GenerateRequest | TooLargeToDecode, context: Context) -> bytes:
        limit = reply_limit(context.invocation_metadata())
        live = await self._open(request, limit, context)
        with closing(live):
            reply = await whole_reply(live, self._served_model, limit)
        self._report_load(context)
        return reply

    async def GenerateStream(
        self, request: inference_pb2.GenerateStreamRequest | TooLargeToDecode, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateStreamResponse]:
        live = await self._open(request, None, context)
        with closing(live):
            num_open = len(live.choices)
            async for delta in live.deltas():
                num_open -= delta.end is not None
                yield stream_message(live, delta, is_last=not num_open)
        self._report_load(context)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest | TooLargeToDecode, context: Context
    ) -> inference_pb2.TokenizeResponse:
        if isinstance(request, TooLargeToDecode):
            raise request.error
        check_model(request.model, self._served_model)
        field, text, has_chat = "text", request.text, request.HasField("chat")
        if has_chat:
            if text:
                raise InvalidRequest(FieldViolation("text", "must be empty, as there is a chat"))
            field, text = "chat", await self._front_end.chats.render("chat", chat_of(request.chat))
        add_special_tokens = request.add_special_tokens if request.HasField("add_special_tokens") else not has_chat
        ids = await self._front_end.encoder.encode(
            field, text, max_tokens=self.token_limit(), add_special_tokens=add_special_tokens
        )
        return inference_pb2.TokenizeResponse(token_ids=ids.tolist())

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest | TooLargeToDecode, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        if isinstance(request, TooLargeToDecode):
            raise request.error
        check_model(request.model, self._served_model)
        decoder, limit = self._front_end.decoder, reply_limit(context.invocation_metadata())
        vocab_size = decoder.tokenizer.get_vocab_size()
        ids = await check_token_ids("token_ids", request.token_ids, self.token_limit(), vocab_size)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        if decoder.min_text_bytes(ids, skip_special_tokens=skip) > limit:
            raise reply_too_large(limit)
        try:
            text = await decoder.decode_away(ids.tolist(), skip_special_tokens=skip)
        except BaseException as error:
            raise text_failure("the tokenizer failed on the ids", error) from error
        reply = inference_pb2.DetokenizeResponse(text=text)
        if reply.ByteSize() > limit:
            raise reply_too_large(limit)
        return reply

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: Context
    ) -> inference_pb2.GetModelInfoResponse:
        worker = self._front_end.worker
        defaults = worker.sampling_defaults
        return inference_pb2.GetModelInfoResponse(
            model=self._served_model,
            fingerprint=worker.fingerprint,
            dtype=worker.dtype,
            vocab_size=worker.vocab_size,
            max_model_len=worker.max_model_len,
            eos_token_ids=worker.eos_token_ids,
            default_sampling=inference_pb2.SamplingParams(**defaults) if defaults else None,  # type: ignore[arg-type]
            has_chat_template=self._front_end.chats.has_template,
        )

    async def _open(
        self, request: AnyGenerateRequest | TooLargeToDecode, max_reply_bytes: int | None, context: Context
    ) -> LiveRequest:
        front_end, arrived_at = self._front_end, time.monotonic()
        with counting_refusals(front_end):
            if isinstance(request, TooLargeToDecode):
                raise request.error
            front_end.refuse_if_draining()
            params = for_caller(params_of(request, max_reply_bytes, deadline_of(context)))
            checked = await check_request(
                params, front_end.encoder, front_end.worker, self._served_model, front_end.grammars, front_end.chats
            )
            trace = None
            if front_end.has_traces:
                method = "GenerateStream" if max_reply_bytes is None else "Generate"
                trace = trace_of(context, f"{SERVICE_NAME}/{method}")
            return await front_end.open(checked, arrived_at, trace)

    def _report_load(self, context: Context) -> None:
        """Has the call's trailers bring the engine's load, for clients and proxies that know ORCA."""
        if report := self._front_end.engine.load_report:
            context.set_trailing_metadata(((LOAD_REPORT_KEY, report),))

    def token_limit(self) -> int:
        """The most tokens that Tokenize returns and Detokenize accepts, and that a prompt may have to be decoded."""
        worker = self._front_end.engine.state.worker
        return max(MIN_TOKEN_LIMIT, worker.max_model_len if worker is not None else 0)
