"""Turns a request's output into messages of the gRPC API. A whole reply is built and encoded part by part, and the
event loop has other turns in between, so that a large reply does not hold up other requests.
"""

import asyncio

from tandem.v1 import inference_pb2
from tandem_scheduler.core.types import FinishReason
from tandem_scheduler.front_end.live_request import ChoiceDelta, ChoiceEnd, LiveRequest, reply_too_large

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
}

TOKENS_AT_ONCE = 32
"""Tokens with log-probabilities that are encoded between two turns of the event loop; a millisecond. The step loop
needs several turns for a step."""

CHOICES_TAG = bytes([inference_pb2.GenerateResponse.CHOICES_FIELD_NUMBER << 3 | 2])


def stream_message(live: LiveRequest, delta: ChoiceDelta, *, is_last: bool) -> inference_pb2.GenerateStreamResponse:
    message = inference_pb2.GenerateStreamResponse(
        request_id=live.request.request_id,
        choice_index=delta.choice_index,
        text_delta=delta.text,
        token_ids=delta.token_ids,
        finish=_finish(delta.end) if delta.end is not None else None,
        usage=_usage(live) if is_last else None,
    )
    _add_logprobs(message, delta, 0, len(delta.logprobs))
    return message


async def whole_reply(live: LiveRequest, model: str, max_bytes: int) -> bytes:
    """Reads a request to its end: an encoded GenerateResponse. Raises OutputTooLarge where it has more than max_bytes.

    A message is the fields that it consists of in a row, and messages in a row are one with all of their fields: so
    each part is encoded by itself, and what it was made of is dropped.
    """
    parts: list[bytes] = []
    num_bytes = 0
    async for delta in live.deltas():
        choice = await _encoded_choice(delta, max_bytes - num_bytes)
        parts += [CHOICES_TAG, _varint(len(choice)), choice]
        num_bytes += len(choice)
    outer = inference_pb2.GenerateResponse(request_id=live.request.request_id, model=model, usage=_usage(live))
    parts.append(outer.SerializeToString())
    if sum(map(len, parts)) > max_bytes:
        raise reply_too_large(max_bytes)
    return b"".join(parts)


async def _encoded_choice(delta: ChoiceDelta, max_bytes: int) -> bytes:
    """Raises OutputTooLarge as soon as the parts are larger."""
    choice = inference_pb2.Choice(
        choice_index=delta.choice_index,
        text=delta.text,
        token_ids=delta.token_ids,
        finish=_finish(delta.end) if delta.end is not None else None,
    )
    parts: list[bytes] = [choice.SerializeToString()]
    num_bytes = len(parts[0])
    for start in range(0, len(delta.logprobs), TOKENS_AT_ONCE):
        if num_bytes > max_bytes:
            break
        part = inference_pb2.Choice()
        _add_logprobs(part, delta, start, start + TOKENS_AT_ONCE)
        parts.append(part.SerializeToString())
        num_bytes += len(parts[-1])
        await asyncio.sleep(0)
    if num_bytes > max_bytes:
        raise reply_too_large(max_bytes)
    return b"".join(parts)


def _add_logprobs(
    message: inference_pb2.Choice | inference_pb2.GenerateStreamResponse, delta: ChoiceDelta, start: int, end: int
) -> None:
    reports = delta.logprobs.reports(start, end)
    for token_id, (logprob, top_token_ids, top_logprobs) in zip(delta.token_ids[start:end], reports, strict=False):
        add_top = message.logprobs.add(token_id=token_id, logprob=logprob).top.add
        for top_token_id, top_logprob in zip(top_token_ids, top_logprobs, strict=True):
            add_top(token_id=top_token_id, logprob=top_logprob)


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


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
