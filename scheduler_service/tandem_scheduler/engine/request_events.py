"""Makes request events of what the hub sees of single sequences. The hub has a RequestEvents only if it has an
observer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem_scheduler.core.types import FinishReason, SequenceRequest
from tandem_scheduler.engine.observer import (
    FirstToken,
    Observer,
    RequestClosed,
    RequestEnded,
    RequestRefused,
    RequestSubmitted,
    guarded,
)
from tandem_scheduler.engine_interface import RequestOutcome, SequenceEnd, Submission
from tandem_shared.errors import TandemError


@dataclass(slots=True, eq=False)
class _Request:
    """A live request, and the ends of its choices so far."""

    submitted: RequestSubmitted
    reasons: dict[int, FinishReason]
    """The finish reasons of the choices that have ended, by sequence id."""
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    error: TandemError | None = None


class RequestEvents:
    """Tells an observer of the live requests."""

    def __init__(self, observer: Observer) -> None:
        self._observe = guarded(observer)
        # Both by sequence id.
        self._live: dict[int, _Request] = {}
        self._without_token: dict[int, _Request] = {}
        # Requests whose calls are not over, by their first sequence's id.
        self._ended: dict[int, RequestEnded] = {}

    def submitted(self, submission: Submission, choices: Sequence[SequenceRequest]) -> None:
        first = choices[0]
        event = RequestSubmitted(
            submission.request_id,
            first.sequence_id,
            len(choices),
            len(first.prompt_token_ids),
            first.max_tokens,
            first.sampling,
            submission.trace,
        )
        request = _Request(event, {})
        for choice in choices:
            self._live[choice.sequence_id] = self._without_token[choice.sequence_id] = request
        self._observe(event)

    def refused(self, request_id: str, error: TandemError) -> None:
        self._observe(RequestRefused(request_id, error))

    def outputs(self, sequence_ids: Sequence[int]) -> None:
        """A step brought these sequences a token each."""
        if not self._without_token:
            return
        for sequence_id in self._without_token.keys() & sequence_ids:
            # Another choice of the request may have been in the same step.
            if (request := self._without_token.get(sequence_id)) is not None:
                self._forget_first(request)
                self._observe(FirstToken(request.submitted))

    def ended(self, sequence_id: int, end: SequenceEnd, num_output_tokens: int) -> None:
        """A sequence has ended, or its front end has closed its request."""
        request = self._live.pop(sequence_id)
        request.reasons[sequence_id] = end.reason
        request.num_output_tokens += num_output_tokens
        request.num_cached_tokens += end.num_cached_tokens
        request.error = request.error or end.error
        event = request.submitted
        if len(request.reasons) == event.num_choices:
            self._forget_first(request)
            reasons = tuple(request.reasons[sequence_id] for sequence_id in event.sequence_ids)
            ended = RequestEnded(event, reasons, request.num_output_tokens, request.num_cached_tokens, request.error)
            self._ended[event.first_sequence_id] = ended
            self._observe(ended)

    def closed(self, first_sequence_id: int, outcome: RequestOutcome | None) -> None:
        """A request's front end has closed it, so all its sequences have ended."""
        self._observe(RequestClosed(self._ended.pop(first_sequence_id), outcome))

    @property
    def num_held(self) -> int:
        """How many requests and sequences something is kept of. 0 when none is open."""
        return len(self._live) + len(self._without_token) + len(self._ended)

    def _forget_first(self, request: _Request) -> None:
        for sequence_id in request.submitted.sequence_ids:
            self._without_token.pop(sequence_id, None)
