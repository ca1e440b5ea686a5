"""Turns a request's output into messages of the gRPC API. A whole reply is built and encoded part by part, and the
event loop has other turns in between, so that a large reply does not hold up other requests.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from tandem.v1 import inference_pb2
from tandem_scheduler.core.types import FinishReason
from tandem_scheduler.front_end.live_request import ChoiceDelta, ChoiceEnd, LiveRequest, reply_too_large
from tandem_scheduler.front_end.logprob_buffer import TokenReport
from tandem_shared.rpc.wire_fields import tags

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
}

TOKENS_AT_ONCE = 32
"""Tokens with log-probabilities that are encoded between two turns of the event loop; a millisecond. The step loop
needs several turns for a step."""

CHOICES_TAG = bytes(tags(inference_pb2.GenerateResponse, "choices"))


def stream_message(live: LiveRequest, delta: ChoiceDelta, *, is_last: bool) -> inference_pb2.GenerateStreamResponse:
    request_id = live.request.request_id
    if delta.is_prompt:
        message = inference_pb2.GenerateStreamResponse(request_id=request_id)
        _add_reports(message.prompt_logprobs, live, zip(delta.token_ids, delta.logprobs, strict=True))
        return message
    message = inference_pb2.GenerateStreamResponse(
        request_id=request_id,
        choice_index=delta.choice_index,
        text_delta=delta.text,
        token_ids=delta.token_ids,
        finish=_finish(delta.end) if delta.end is not None else None,
        usage=_usage(live) if is_last else None,
    )
    if delta.logprobs:
        _add_reports(message.logprobs, live, zip(delta.token_ids, delta.logprobs, strict=False))
    return message


async def whole_reply(live: LiveRequest, model: str, max_bytes: int) -> bytes:
    """Reads a request to its end: an encoded GenerateResponse. Raises OutputTooLarge where it has more than max_bytes.

    A message is the fields that it consists of in a row, and messages in a row are one with all of their fields: so
    each part is encoded by itself, and what it was made of is dropped.
    """
    parts: list[bytes] = []
    num_bytes = 0
    async for delta in live.deltas():
        if delta.is_prompt:
            room = max_bytes - num_bytes
            part = await _encoded_reports(inference_pb2.GenerateResponse, "prompt_logprobs", live, delta, room)
        else:
            choice = await _encoded_choice(live, delta, max_bytes - num_bytes)
            part = CHOICES_TAG + _varint(len(choice)) + choice
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise reply_too_large(max_bytes)
    outer = inference_pb2.GenerateResponse(request_id=live.request.request_id, model=model, usage=_usage(live))
    parts.append(outer.SerializeToString())
    if num_bytes + len(parts[-1]) > max_bytes:
        raise reply_too_large(max_bytes)
    return b"".join(parts)


async def _encoded_choice(live: LiveRequest, delta: ChoiceDelta, max_bytes: int) -> bytes:
    """Encodes no further once it has more than max_bytes."""
    choice = inference_pb2.Choice(
        choice_index=delta.choice_index,
        text=delta.text,
        token_ids=delta.token_ids,
        finish=_finish(delta.end) if delta.end is not None else None,
    ).SerializeToString()
    return choice + await _encoded_reports(inference_pb2.Choice, "logprobs", live, delta, max_bytes - len(choice))


async def _encoded_reports(
    kind: type[inference_pb2.Choice | inference_pb2.GenerateResponse],
    field: str,
    live: LiveRequest,
    delta: ChoiceDelta,
    max_bytes: int,
) -> bytes:
    """The delta's log-probabilities in this field of a message that has nothing else, encoded. Encodes no further once
    it has more than max_bytes.
    """
    parts: list[bytes] = []
    num_bytes = 0
    entries = zip(delta.token_ids, delta.logprobs, strict=False)
    while num_bytes <= max_bytes and (some := list(islice(entries, TOKENS_AT_ONCE))):
        # A new message each time, because one that is emptied keeps its memory.
        part = kind()
        _add_reports(getattr(part, field), live, some)
        parts.append(part.SerializeToString())
        num_bytes += len(parts[-1])
        await asyncio.sleep(0)
    return b"".join(parts)


def _add_reports(
    messages: "RepeatedCompositeFieldContainer[inference_pb2.TokenLogprob]",
    live: LiveRequest,
    entries: Iterable[tuple[int, TokenReport]],
) -> None:
    """entries: tokens and their reports."""
    spell, requested_ids = live.spell, live.request.first.lists.logprob_token_ids
    for token_id, report in entries:
        token_bytes, text = spell(token_id)
        message = messages.add(
            token_id=token_id, logprob=report.logprob, rank=report.rank, token_bytes=token_bytes, text=text
        )
        _add_tokens(message.top, report.top_token_ids, report.top_logprobs, spell)
        if report.requested_logprobs:
            _add_tokens(message.requested, requested_ids, report.requested_logprobs, spell)


def _add_tokens(
    messages: "RepeatedCompositeFieldContainer[inference_pb2.TopLogprob]",
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    spell: Callable[[int], tuple[bytes, str]],
) -> None:
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        token_bytes, text = spell(token_id)
        messages.add(token_id=token_id, logprob=logprob, token_bytes=token_bytes, text=text)


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
