"""What the hub makes of the core's data for front ends, and of theirs for the core."""

from dataclasses import replace

from tandem_scheduler.core.types import FinishedSequence, FinishReason
from tandem_shared.errors import DeadlinePassed, FieldViolation, InvalidRequest, SequenceFailed, TandemError
from tandem_shared.sampling_fields import RowSampling


def counts_of(end: FinishedSequence | None) -> tuple[int, int]:
    """Output tokens and cached prompt tokens; zeros where the core had ended the sequence before."""
    return (end.num_output_tokens, end.num_cached_tokens) if end is not None else (0, 0)


def sampling_of_choice(sampling: RowSampling, index: int) -> RowSampling:
    """The choices differ in their random numbers, and only the first one reports the prompt, which they share."""
    num_prompt_logprobs = sampling.num_prompt_logprobs if index == 0 else None
    return replace(sampling, choice_index=index, num_prompt_logprobs=num_prompt_logprobs)


def error_of(end: FinishedSequence) -> TandemError | None:
    match end.reason:
        case FinishReason.ERROR if end.error_field is not None:
            return InvalidRequest(FieldViolation(end.error_field, end.error or ""))
        case FinishReason.ERROR:
            return SequenceFailed(end.error or "the sequence failed")
        case FinishReason.EXPIRED:
            return DeadlinePassed("the call's deadline passed while it waited")
        case _:
            return None
