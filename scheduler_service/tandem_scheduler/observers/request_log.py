"""A line in the log for each request that has ended: how much it read and wrote, how long it took, how it ended. Never
its prompt, its output or its cache salt.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable

from tandem_scheduler.engine.observer import Event, RequestClosed
from tandem_shared.errors import reason_of
from tandem_shared.host.log import FIELDS

FEW_PER_SECOND = 10
"""The most lines in a second with `few`. Under more load than that nobody reads them as they come."""

logger = logging.getLogger(__name__)


class RequestLog:
    """An observer, by tell()."""

    def __init__(self, is_limited: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """is_limited: no more than FEW_PER_SECOND lines in a second of the clock, and then one that counts the rest."""
        self._is_limited = is_limited
        self._clock = clock
        self._second = 0
        self._num_lines = 0
        self._left_out: Counter[str] = Counter()

    def tell(self, event: Event) -> None:
        """Takes an event of the engine."""
        if isinstance(event, RequestClosed):
            fields = fields_of(event)
            if self._may_write(str(fields["end"])):
                logger.info("%s", _line(fields), extra={FIELDS: {"request": fields}})

    def flush(self) -> None:
        """Writes how many requests were left out in a second that is over."""
        if self._left_out and int(self._clock()) != self._second:
            ends = ", ".join(f"{count} {end}" for end, count in sorted(self._left_out.items()))
            logger.info("%d requests more ended: %s", self._left_out.total(), ends)
            self._left_out.clear()

    def _may_write(self, end: str) -> bool:
        if not self._is_limited:
            return True
        self.flush()
        second = int(self._clock())
        if second != self._second:
            self._second, self._num_lines = second, 0
        self._num_lines += 1
        if self._num_lines > FEW_PER_SECOND:
            self._left_out[end] += 1
            return False
        return True


def fields_of(event: RequestClosed) -> dict[str, object]:
    """What is logged of a request. Times are in seconds from the call's arrival at its front end."""
    ended, outcome = event.ended, event.outcome
    reasons = ended.reasons if outcome is None else outcome.reasons
    fields: dict[str, object] = {
        "id": ended.request.request_id,
        "prompt_tokens": ended.request.num_prompt_tokens,
        "cached_tokens": ended.num_cached_tokens,
        "output_tokens": ended.num_output_tokens if outcome is None else sum(outcome.num_output_tokens),
        "choices": ended.request.num_choices,
        "end": ", ".join(dict.fromkeys(reason.value for reason in reasons)),
    }
    if outcome is not None:
        if outcome.first_token_at is not None:
            fields["first_token_s"] = round(outcome.first_token_at - outcome.arrived_at, 4)
        fields["total_s"] = round(outcome.ended_at - outcome.arrived_at, 4)
    if ended.error is not None:
        fields["error"] = reason_of(type(ended.error))
    return fields


def _line(fields: dict[str, object]) -> str:
    # Clients choose ids, of printable characters. In quotes one with spaces can't pass for a part of the line.
    name = str(fields["id"])
    name = repr(name) if " " in name else name
    choices = f" in {fields['choices']} choices" if fields["choices"] != 1 else ""
    first = f", first token after {fields['first_token_s']:.3f} s" if "first_token_s" in fields else ""
    total = f", all after {fields['total_s']:.3f} s" if "total_s" in fields else ", its front end has gone"
    error = f" ({fields['error']})" if "error" in fields else ""
    return (
        f"request {name}: {fields['prompt_tokens']} tokens in ({fields['cached_tokens']} cached), "
        f"{fields['output_tokens']} out{choices}{first}{total}: {fields['end']}{error}"
    )
