"""Turns requests of vllm.grpc.engine.VllmEngine into GenerationParams, and a request's output into its messages.

Most fields of vLLM's SamplingParams are plain proto3 scalars, so a field that was left out cannot be told from a zero.
Where zero is no possible value, it stands for the model's default. A `top_k` or `min_p` of 0 is off, as in vLLM: the
gateway SMG fills in the model's defaults itself, and sends 0 for a user who turns them off. The seed is an int32; the
negative ones are seeds like others.

What Tandem cannot do is refused. Three fields mean nothing here: `tokenized.original_text` and
`spaces_between_special_tokens`, as the gateway makes the texts, and `grammar_from_first_token`, as all grammars begin
there.
"""

import asyncio
from array import array
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeVar

from smg_grpc_proto import vllm_engine_pb2

from tandem_scheduler.core.types import FinishReason
from tandem_scheduler.front_end.generation_params import GenerationParams, StructuredOutput
from tandem_scheduler.front_end.grpc_api.wire_limits import (
    MAX_FIELDS,
    MAX_OTHER_BYTES,
    TooLargeToDecode,
    bounded,
    num_bytes_beside,
    violation_of_sizes,
)
from tandem_scheduler.front_end.live_request import ChoiceDelta, LiveRequest, reply_too_large
from tandem_scheduler.front_end.logprob_buffer import TokenReport
from tandem_scheduler.front_end.violations import Violations
from tandem_shared.errors import FieldViolation
from tandem_shared.rpc.wire_fields import TooManyFields, fields, tags

Request = Any
"""A vllm.grpc.engine.GenerateRequest. The package of its messages has no types."""

MAX_SAMPLING_FIELDS = 2048
"""The most fields on the wire of sampling parameters, if the request is not small: 1024 biases, 64 stop strings and 128
stop tokens are the longest lists.
"""

REPORTS_AT_ONCE = 128
"""Log-probability reports that are put into a message between two turns of the event loop; a millisecond."""

FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORT: "abort"}

UNSUPPORTED = ("kv_transfer_params", "kv_transfer_params_json", "mm_inputs", "media_refs")
"""Fields of a request that ask for what Tandem does not have."""

T = TypeVar("T")

TOKENIZED_TAG, TEXT_TAG, SAMPLING_TAG = tags(vllm_engine_pb2.GenerateRequest, "tokenized", "text", "sampling_params")
ORIGINAL_TEXT_TAGS = tags(vllm_engine_pb2.TokenizedInput, "original_text")
GRAMMAR_TAGS = tags(vllm_engine_pb2.SamplingParams, "json_schema", "regex", "grammar", "structural_tag")


def bounded_vllm_generate(
    decode: Callable[[bytes], T], max_num_ids: Callable[[], int]
) -> Callable[[bytes], T | TooLargeToDecode]:
    """A decoder of a GenerateRequest that measures it first. max_num_ids gives how many ids a prompt may have."""
    return bounded(decode, lambda data: _violation(data, max_num_ids()), MAX_OTHER_BYTES)


def _violation(data: bytes, max_num_ids: int) -> FieldViolation | None:
    num_other = num_id_bytes = 0
    try:
        for tag, start, end in fields(data, 0, len(data), MAX_FIELDS):
            if tag == TOKENIZED_TAG:
                num_id_bytes += num_bytes_beside(ORIGINAL_TEXT_TAGS, data, start, end)
            elif tag == SAMPLING_TAG:
                num_other += num_bytes_beside(GRAMMAR_TAGS, data, start, end, MAX_SAMPLING_FIELDS)
            elif tag != TEXT_TAG:
                num_other += end - start
    except TooManyFields:
        num_other = len(data)
    return violation_of_sizes(num_other, num_id_bytes, "tokenized.input_ids", max_num_ids)


def vllm_params_of(request: Request, max_reply_bytes: int, deadline: float | None) -> GenerationParams:
    """max_reply_bytes limits an output that is not streamed. deadline is the call's, in seconds of time.monotonic().
    Raises InvalidRequest for what Tandem does not do.
    """
    _check_supported(request)
    sampling = request.sampling_params
    numbers = {
        name: getattr(sampling, name)
        for name in ("top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    }
    for name in ("top_p", "repetition_penalty"):
        if not numbers[name]:
            del numbers[name]
    for name in ("temperature", "seed"):
        if sampling.HasField(name):
            numbers[name] = getattr(sampling, name)
    if "seed" in numbers:
        numbers["seed"] %= 2**64
    return GenerationParams(
        prompt_text=request.text if request.HasField("text") else None,
        prompt_token_ids=request.tokenized.input_ids if request.HasField("tokenized") else None,
        request_id=request.request_id,
        sampling=numbers if request.HasField("sampling_params") else {},
        logit_bias=sampling.logit_bias,
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        min_tokens=sampling.min_tokens,
        stop_strings=sampling.stop,
        include_stop_string=sampling.include_stop_str_in_output,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        skip_special_tokens=sampling.skip_special_tokens,
        num_logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        num_prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
        structured_output=_form_of(sampling),
        num_choices=sampling.n or 1,
        max_reply_bytes=None if request.stream else max_reply_bytes,
        deadline=deadline,
    )


def _check_supported(request: Request) -> None:
    violations, sampling = Violations(), request.sampling_params
    for name in UNSUPPORTED:
        violations.check(not request.HasField(name), name, "is not supported")
    violations.check(not request.extra_mm_inputs, "extra_mm_inputs", "is not supported")
    violations.check(request.data_parallel_rank == 0, "data_parallel_rank", "must be 0, as there is one engine")
    for name in ("structural_tag", "truncate_prompt_tokens"):
        violations.check(not sampling.HasField(name), f"sampling_params.{name}", "is not supported")
    if request.stream:
        reports_prompt = sampling.HasField("prompt_logprobs")
        violations.check(not reports_prompt, "sampling_params.prompt_logprobs", "is not possible in a stream")
    violations.raise_any()


def _form_of(sampling: Request) -> StructuredOutput | None:
    kind = sampling.WhichOneof("constraint")
    if kind is None:
        return None
    if kind == "json_object" and not sampling.json_object:
        return None
    return StructuredOutput(
        json_schema=sampling.json_schema if kind == "json_schema" else None,
        json_object=kind == "json_object",
        regex=sampling.regex if kind == "regex" else None,
        lark=sampling.grammar if kind == "grammar" else None,
        choice=sampling.choice.choices if kind == "choice" else None,
    )


class VllmReplies:
    """Makes the messages that answer one request from its deltas."""

    def __init__(self, live: LiveRequest, request: Request, max_reply_bytes: int) -> None:
        self._live = live
        self._stop_token_ids = frozenset(request.sampling_params.stop_token_ids)
        self._max_reply_bytes = max_reply_bytes
        self._prompt_reports: Any = None
        # All tokens of each choice so far.
        self._token_ids = [array("i") for _ in live.choices]

    async def of(self, delta: ChoiceDelta) -> list[Any]:
        """The messages of a delta: a chunk if the request streams and there are new tokens, and the complete output at
        the end of a choice. Raises OutputTooLarge.
        """
        if delta.is_prompt:
            self._prompt_reports = await self._prompt_message(delta)
            return []
        messages, live = [], self._live
        token_ids = self._token_ids[delta.choice_index]
        token_ids += delta.token_ids
        reports = await _output_reports(delta) if delta.logprobs else None
        counts = {
            "index": delta.choice_index,
            "prompt_tokens": live.request.num_prompt_tokens,
            "completion_tokens": len(token_ids),
        }
        if live.is_streaming and delta.token_ids:
            chunk = vllm_engine_pb2.GenerateStreamChunk(token_ids=delta.token_ids, output_logprobs=reports, **counts)
            messages.append(vllm_engine_pb2.GenerateResponse(chunk=chunk))
        if delta.end is not None:
            complete = vllm_engine_pb2.GenerateComplete(
                output_ids=token_ids,
                finish_reason=FINISH_REASONS[delta.end.reason],
                cached_tokens=delta.end.num_cached_tokens,
                output_logprobs=None if live.is_streaming else reports,
                input_logprobs=self._prompt_reports,
                **counts,
            )
            # The prompt is told with the first choice alone.
            self._prompt_reports = None
            if delta.end.stop_string is not None:
                complete.matched_stop_str = delta.end.stop_string
            elif delta.end.stop_token_id in self._stop_token_ids:
                # An end-of-sequence token is no stop that the request named.
                complete.matched_token_id = delta.end.stop_token_id
            messages.append(vllm_engine_pb2.GenerateResponse(complete=complete))
            if not live.is_streaming and messages[-1].ByteSize() > self._max_reply_bytes:
                raise reply_too_large(self._max_reply_bytes)
        return messages

    async def _prompt_message(self, delta: ChoiceDelta) -> Any:
        """The prompt's tokens and log-probabilities. Its first token has none."""
        message = vllm_engine_pb2.InputLogProbs()
        message.token_ids.append(int(self._live.request.first.prompt_token_ids[0]))
        message.token_logprobs.add()
        message.top_logprobs.add()
        entries = zip(delta.token_ids, delta.logprobs, strict=True)
        while some := list(islice(entries, REPORTS_AT_ONCE)):
            for token_id, report in some:
                message.token_ids.append(token_id)
                message.token_logprobs.add(value=report.logprob)
                message.top_logprobs.add(values=report.top_logprobs, token_ids=report.top_token_ids)
            await asyncio.sleep(0)
        return message


async def _output_reports(delta: ChoiceDelta) -> Any:
    message = vllm_engine_pb2.OutputLogProbs()
    entries: Iterable[tuple[int, TokenReport]] = zip(delta.token_ids, delta.logprobs, strict=False)
    while some := list(islice(entries, REPORTS_AT_ONCE)):
        for token_id, report in some:
            message.token_ids.append(token_id)
            message.token_logprobs.append(report.logprob)
            message.top_logprobs.add(values=report.top_logprobs, token_ids=report.top_token_ids)
        if len(some) == REPORTS_AT_ONCE:
            await asyncio.sleep(0)
    return message
