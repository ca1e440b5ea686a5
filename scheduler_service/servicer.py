"""The public inference RPCs: validate, submit, stream. A cancelled call aborts its request."""

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc

from scheduler_service.core.types import FinishReason
from scheduler_service.front_end import ChoiceEnd, FrontEnd, LiveRequest
from scheduler_service.tokenizer import encode
from scheduler_service.validation import AnyGenerateRequest, check_model, check_request
from shared.errors import FieldViolation, InvalidRequest, WorkerUnavailable
from shared.step_plan import RowLogprobs, WorkerInfo
from tandem.v1 import inference_pb2, inference_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, front_end: FrontEnd, served_model: str) -> None:
        self._front_end = front_end
        self._served_model = served_model

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        live = await self._open(request, is_streaming=False)
        try:
            choices = [inference_pb2.Choice(choice_index=index) for index in range(len(live.choices))]
            async for delta in live.deltas():
                choice = choices[delta.choice_index]
                choice.text += delta.text
                choice.token_ids.extend(delta.token_ids)
                choice.logprobs.extend(map(_logprob, delta.token_ids, delta.logprobs))
                if delta.end is not None:
                    choice.finish.CopyFrom(_finish(delta.end))
            return inference_pb2.GenerateResponse(
                request_id=live.request.request_id, model=self._served_model, choices=choices, usage=_usage(live)
            )
        finally:
            live.close()

    async def GenerateStream(
        self, request: inference_pb2.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateStreamResponse]:
        live = await self._open(request, is_streaming=True)
        try:
            num_open = len(live.choices)
            async for delta in live.deltas():
                num_open -= delta.end is not None
                yield inference_pb2.GenerateStreamResponse(
                    request_id=live.request.request_id,
                    choice_index=delta.choice_index,
                    text_delta=delta.text,
                    token_ids=delta.token_ids,
                    logprobs=map(_logprob, delta.token_ids, delta.logprobs),
                    finish=_finish(delta.end) if delta.end is not None else None,
                    usage=_usage(live) if not num_open else None,
                )
        finally:
            live.close()

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        check_model(request.model, self._served_model)
        add_special_tokens = request.add_special_tokens if request.HasField("add_special_tokens") else True
        ids = await encode(self._front_end.tokenizer, request.text, add_special_tokens=add_special_tokens)
        return inference_pb2.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        check_model(request.model, self._served_model)
        tokenizer = self._front_end.tokenizer
        vocab_size = tokenizer.get_vocab_size()
        outside = [token_id for token_id in request.token_ids if token_id >= vocab_size]
        if outside:
            raise InvalidRequest(FieldViolation("token_ids", f"{outside[0]} is not in the vocabulary of {vocab_size}"))
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return inference_pb2.DetokenizeResponse(text=tokenizer.decode(request.token_ids, skip_special_tokens=skip))

    async def _open(self, request: AnyGenerateRequest, *, is_streaming: bool) -> LiveRequest:
        self._front_end.refuse_if_draining()
        checked = await check_request(request, self._front_end.tokenizer, self._worker(), self._served_model)
        return await self._front_end.open(checked, is_streaming=is_streaming)

    def _worker(self) -> WorkerInfo:
        worker = self._front_end.engine.state.worker
        if worker is None:
            raise WorkerUnavailable("no worker has been seen yet")
        return worker


def _finish(end: ChoiceEnd) -> inference_pb2.Finish:
    finish = inference_pb2.Finish(reason=FINISH_REASONS[end.reason])
    if end.stop_string is not None:
        finish.stop_string = end.stop_string
    elif end.stop_token_id is not None:
        finish.stop_token_id = end.stop_token_id
    return finish


def _usage(live: LiveRequest) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        num_prompt_tokens=live.request.num_prompt_tokens,
        num_cached_tokens=live.num_cached_tokens,
        num_output_tokens=live.num_output_tokens,
    )


def _logprob(token_id: int, report: RowLogprobs) -> inference_pb2.TokenLogprob:
    top = [
        inference_pb2.TopLogprob(token_id=top_id, logprob=logprob)
        for top_id, logprob in zip(report.top_token_ids, report.top_logprobs, strict=True)
    ]
    return inference_pb2.TokenLogprob(token_id=token_id, logprob=report.logprob, top=top)
