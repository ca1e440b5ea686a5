"""Encodes and decodes the messages between a front-end process and the engine. Knows the wire's field names."""

import dataclasses

import numpy as np
from google.rpc import status_pb2

from tandem.internal.v1 import engine_pb2
from tandem_scheduler.core.types import FinishReason, SequenceRequest
from tandem_scheduler.engine_interface import (
    EngineState,
    FrontEndStats,
    OutputBatch,
    RequestOutcome,
    SequenceEnd,
    Submission,
    TraceContext,
)
from tandem_shared.errors import ProtocolError, TandemError, UnexpectedMessage
from tandem_shared.rpc.rich_status import read_status, status_of
from tandem_shared.sampling_lists import NO_LISTS
from tandem_shared.step_codec import (
    decode_info,
    decode_lists,
    decode_prompt_logprobs,
    decode_sampling,
    encode_info,
    encode_lists,
    encode_prompt_logprobs,
    encode_sampling,
    pack_ids,
    unpack_ids,
)
from tandem_shared.step_plan import RowLogprobs

_REASONS = {
    FinishReason.STOP: engine_pb2.END_REASON_STOP,
    FinishReason.LENGTH: engine_pb2.END_REASON_LENGTH,
    FinishReason.ABORT: engine_pb2.END_REASON_ABORT,
    FinishReason.ERROR: engine_pb2.END_REASON_ERROR,
}
HANDLES = np.dtype("<u8")
_REASONS_BACK = {wire: reason for reason, wire in _REASONS.items()}


def encode_submit(submission: Submission) -> engine_pb2.SubmitRequest:
    first = submission.first
    message = engine_pb2.SubmitRequest(
        request_id=submission.request_id,
        first_handle=submission.first_handle,
        num_choices=submission.num_choices,
        fingerprint=submission.fingerprint,
        prompt_token_ids=pack_ids(first.prompt_token_ids),
        max_tokens=first.max_tokens,
        stop_token_ids=first.stop_token_ids,
        priority=first.priority,
        cache_salt=first.cache_salt,
        deadline=first.deadline,
    )
    encode_sampling(first.sampling, message.sampling)
    if first.lists:
        encode_lists(first.lists, message.lists)
    if (trace := submission.trace) is not None:
        message.trace.MergeFrom(engine_pb2.TraceContext(**dataclasses.asdict(trace)))
    return message


def decode_submit(message: engine_pb2.SubmitRequest) -> Submission:
    first = SequenceRequest(
        sequence_id=0,
        prompt_token_ids=unpack_ids(message.prompt_token_ids),
        max_tokens=message.max_tokens,
        sampling=decode_sampling(message.sampling),
        lists=decode_lists(message.lists) if message.HasField("lists") else NO_LISTS,
        stop_token_ids=frozenset(message.stop_token_ids),
        priority=message.priority,
        cache_salt=message.cache_salt,
        deadline=message.deadline if message.HasField("deadline") else None,
    )
    return Submission(
        request_id=message.request_id,
        first_handle=message.first_handle,
        first=first,
        num_choices=message.num_choices,
        fingerprint=message.fingerprint,
        trace=_decode_trace(message.trace) if message.HasField("trace") else None,
    )


def _decode_trace(message: engine_pb2.TraceContext) -> TraceContext:
    return TraceContext(message.rpc, message.traceparent, message.tracestate)


def encode_state(state: EngineState) -> engine_pb2.EngineState:
    return engine_pb2.EngineState(
        worker=encode_info(state.worker) if state.worker is not None else None,
        is_ready=state.is_ready,
        is_draining=state.is_draining,
    )


def decode_state(message: engine_pb2.EngineState) -> EngineState:
    worker = decode_info(message.worker) if message.HasField("worker") else None
    return EngineState(worker, message.is_ready, message.is_draining)


def encode_outputs(batch: OutputBatch) -> engine_pb2.AttachResponse:
    message = engine_pb2.AttachResponse(
        token_handles=np.array(batch.token_handles, HANDLES).tobytes(),
        token_ids=pack_ids(batch.token_ids),
        logprobs=_encode_logprobs(batch.logprobs) if batch.logprobs else None,
        ends=[
            engine_pb2.SequenceEnd(
                handle=end.handle,
                reason=_REASONS[end.reason],
                num_cached_tokens=end.num_cached_tokens,
                stop_token_id=end.stop_token_id,
                error=encode_error(end.error) if end.error is not None else None,
            )
            for end in batch.ends
        ],
    )
    for handle, report in batch.prompt_logprobs:
        encode_prompt_logprobs(report, message.prompt_logprobs.add(handle=handle).report)
    return message


def decode_outputs(message: engine_pb2.AttachResponse) -> OutputBatch:
    return OutputBatch(
        np.frombuffer(message.token_handles, HANDLES).tolist(),
        unpack_ids(message.token_ids).tolist(),
        _decode_logprobs(message.logprobs),
        [
            SequenceEnd(
                end.handle,
                _REASONS_BACK[end.reason],
                end.num_cached_tokens,
                end.stop_token_id if end.HasField("stop_token_id") else None,
                decode_error(end.error) if end.HasField("error") else None,
            )
            for end in message.ends
        ],
        [(each.handle, decode_prompt_logprobs(each.report)) for each in message.prompt_logprobs],
    )


def handles_in(message: engine_pb2.AttachResponse) -> list[int]:
    """The handles of all sequences in a message, as far as it can be read."""
    whole = len(message.token_handles) // HANDLES.itemsize * HANDLES.itemsize
    tokens = np.frombuffer(message.token_handles[:whole], HANDLES).tolist()
    reported = [*message.logprobs.handles, *(each.handle for each in message.prompt_logprobs)]
    return [*tokens, *reported, *(end.handle for end in message.ends)]


def encode_outcome(outcome: RequestOutcome) -> engine_pb2.RequestOutcome:
    return engine_pb2.RequestOutcome(
        arrived_at=outcome.arrived_at,
        first_token_at=outcome.first_token_at,
        ended_at=outcome.ended_at,
        reasons=[_REASONS[reason] for reason in outcome.reasons],
        num_output_tokens=outcome.num_output_tokens,
    )


def decode_outcome(message: engine_pb2.RequestOutcome) -> RequestOutcome:
    return RequestOutcome(
        message.arrived_at,
        message.first_token_at if message.HasField("first_token_at") else None,
        message.ended_at,
        tuple(_REASONS_BACK[reason] for reason in message.reasons),
        tuple(message.num_output_tokens),
    )


def encode_stats(stats: FrontEndStats) -> engine_pb2.FrontEndStats:
    gaps = stats.token_gaps
    return engine_pb2.FrontEndStats(
        token_gap_counts=gaps.counts, token_gap_sum_s=gaps.total, num_refused=stats.num_refused
    )


def decode_stats(message: engine_pb2.FrontEndStats) -> FrontEndStats:
    """Raises UnexpectedMessage for another number of buckets."""
    stats = FrontEndStats()
    gaps = stats.token_gaps
    if len(message.token_gap_counts) != len(gaps.counts):
        raise UnexpectedMessage(f"a front end sent {len(message.token_gap_counts)} buckets, not {len(gaps.counts)}")
    gaps.counts, gaps.total = list(message.token_gap_counts), message.token_gap_sum_s
    stats.num_refused.update(message.num_refused)
    return stats


def encode_error(error: TandemError) -> bytes:
    data: bytes = status_of(error).SerializeToString()
    return data


def decode_error(data: bytes) -> TandemError:
    status = status_pb2.Status.FromString(data)
    return read_status(status) or ProtocolError(f"an error that Tandem does not know: {status.message}")


def _encode_logprobs(reports: list[tuple[int, RowLogprobs]]) -> engine_pb2.TokenLogprobs:
    return engine_pb2.TokenLogprobs(
        handles=[handle for handle, _ in reports],
        logprobs=[report.logprob for _, report in reports],
        num_top=[len(report.top_token_ids) for _, report in reports],
        top_token_ids=[token_id for _, report in reports for token_id in report.top_token_ids],
        top_logprobs=[logprob for _, report in reports for logprob in report.top_logprobs],
        ranks=[report.rank for _, report in reports],
        num_requested=[len(report.requested_logprobs) for _, report in reports],
        requested_logprobs=[logprob for _, report in reports for logprob in report.requested_logprobs],
    )


def _decode_logprobs(message: engine_pb2.TokenLogprobs) -> list[tuple[int, RowLogprobs]]:
    # A slice takes half the time of iterating protobuf's container.
    top_token_ids, top_logprobs = tuple(message.top_token_ids[:]), tuple(message.top_logprobs[:])
    all_requested = tuple(message.requested_logprobs[:])
    reports, start, requested_start = [], 0, 0
    for handle, logprob, num_top, rank, num_requested in zip(
        message.handles, message.logprobs, message.num_top, message.ranks, message.num_requested, strict=True
    ):
        end, requested_end = start + num_top, requested_start + num_requested
        requested = all_requested[requested_start:requested_end]
        # The row is known to the worker's side alone, and not sent.
        reports.append(
            (handle, RowLogprobs(0, logprob, top_token_ids[start:end], top_logprobs[start:end], rank, requested))
        )
        start, requested_start = end, requested_end
    return reports
