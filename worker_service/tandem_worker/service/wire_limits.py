"""Refuses plans that are larger than any for this worker's batch before they are decoded.

Decoding holds up the event loop. Token ids of new rows and of their lists are bytes, which are only copied; but a
message of the same size with thirty million row numbers, or as many empty rows, takes many seconds and gigabytes to
decode.
"""

from collections.abc import Callable
from typing import TypeVar

from tandem.internal.v1 import worker_pb2
from tandem_shared.errors import InvalidPlan
from tandem_shared.rpc.wire_fields import TooManyFields, fields, tags
from tandem_shared.sampling_lists import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_GRAMMAR_BYTES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_STOP_TOKEN_IDS,
)
from tandem_shared.step_plan import WorkerInfo

SMALL_BYTES = 16 * 1024
"""The size up to which a message is decoded without a look at its parts."""

OTHER_FIELDS = 64
"""The most fields of a plan beside its new rows, of a new row, and of its lists. Each message has nine at most, any of
which may come in several parts.
"""

ROW_BYTES = 1024
"""The most bytes of a new row beside its token ids, block ids and lists."""

GRAMMAR_BYTES = 4 * MAX_GRAMMAR_BYTES + 64
"""The most bytes of a grammar: a character of its text has up to four, and there are a few beside the text."""

LIST_BYTES = GRAMMAR_BYTES + 4 * (
    MAX_STOP_TOKEN_IDS
    + MAX_LOGIT_BIAS
    + MAX_ALLOWED_TOKEN_IDS
    + MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS
    + MAX_LOGPROB_TOKEN_IDS
)
"""The most bytes of those lists of a row that are copied: token ids and the grammar."""

LIST_NUMBER_BYTES = 5 * (MAX_LOGIT_BIAS + MAX_BAD_WORDS)
"""The most bytes of those lists of a row that are decoded number by number: the biases and the lengths of bad words."""

NUMBER_BYTES = 32
"""The most bytes of a plan for each row and each token of a step: the numbers of rows that are removed, get a block or
compute.
"""

(PLAN_TAG,) = tags(worker_pb2.ExecuteStepsRequest, "plan")
(ADDED_ROWS_TAG,) = tags(worker_pb2.StepPlan, "added_rows")
(LISTS_TAG,) = tags(worker_pb2.NewRow, "lists")
COPIED_LIST_TAGS = frozenset(
    tags(
        worker_pb2.SamplingLists,
        "stop_token_ids",
        "bias_token_ids",
        "allowed_token_ids",
        "bad_word_token_ids",
        "logprob_token_ids",
        "grammar",
    )
)

T = TypeVar("T")


def bounded_plan(decode: Callable[[bytes], T], info: WorkerInfo) -> Callable[[bytes], T]:
    """A decoder of ExecuteStepsRequest that raises InvalidPlan where a message is larger than any for info's batch."""
    # A row's block table has at most as many entries as the row has tokens.
    max_row_bytes = ROW_BYTES + 8 * info.max_model_len
    max_other_bytes = SMALL_BYTES + NUMBER_BYTES * (info.max_num_rows + info.max_num_batched_tokens)
    max_fields = info.max_num_rows + OTHER_FIELDS

    def is_too_large(data: bytes) -> bool:
        num_other = 0
        try:
            for tag, start, end in fields(data, 0, len(data), OTHER_FIELDS):
                if tag != PLAN_TAG:
                    num_other += end - start
                    continue
                for part, at, stop in fields(data, start, end, max_fields):
                    if part != ADDED_ROWS_TAG:
                        num_other += stop - at
                    elif stop - at > max_row_bytes and _is_row_too_large(data, at, stop, max_row_bytes):
                        return True
        except TooManyFields:
            return True
        return num_other > max_other_bytes

    def decode_bounded(data: bytes) -> T:
        if len(data) > SMALL_BYTES and is_too_large(data):
            raise InvalidPlan("is larger than any plan for this batch")
        return decode(data)

    return decode_bounded


def _is_row_too_large(data: bytes, start: int, end: int, max_bytes: int) -> bool:
    """Whether an added row is too large although it may have lists. max_bytes is the limit of all but its lists. Raises
    TooManyFields.
    """
    num_other = num_copied = num_numbers = 0
    for tag, at, stop in fields(data, start, end, OTHER_FIELDS):
        if tag != LISTS_TAG:
            num_other += stop - at
            continue
        for part, part_at, part_stop in fields(data, at, stop, OTHER_FIELDS):
            if part in COPIED_LIST_TAGS:
                num_copied += part_stop - part_at
            else:
                num_numbers += part_stop - part_at
    return num_other > max_bytes or num_copied > LIST_BYTES or num_numbers > LIST_NUMBER_BYTES
