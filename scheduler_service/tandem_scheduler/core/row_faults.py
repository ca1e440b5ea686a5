"""What the fault of a row means for its sequence: whose fault it is, and the words for it."""

from tandem_scheduler.core.sequence import Sequence
from tandem_shared.step_plan import FAULT_GRAMMAR, FAULT_NAN_LOGITS, FAULT_NO_TOKEN

REQUEST_FAULTS = {
    FAULT_GRAMMAR: ("structured_output", "the grammar failed or needed more than its limits"),
    FAULT_NO_TOKEN: (
        "sampling",
        "allowed_token_ids, bad_words, min_tokens and structured_output leave no token to choose",
    ),
}
"""The faults that a request brings on itself, by code: the request's field, and the error. The row's KV is sound."""


def fault_of(code: int, sequence: Sequence) -> tuple[str, str | None]:
    """The error with which the sequence ends, and the request's field that brought it on; None for no field."""
    if code in REQUEST_FAULTS:
        field, error = REQUEST_FAULTS[code]
        return f"{error} at output token {sequence.num_output_tokens + 1}", field
    what = "the logits are not finite" if code == FAULT_NAN_LOGITS else "this scheduler does not know it"
    return f"the worker reports row fault {code}: {what}", None
