"""Checks the lists of a request: stop strings, and lists of tokens. Bad words become tokens here.

Lengths come before elements: no element of a list is read before the list's length is known to be allowed.
"""

import asyncio
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tandem_scheduler.front_end.generation_params import GenerationParams
from tandem_scheduler.front_end.text.encoder import TextEncoder
from tandem_scheduler.front_end.violations import Violations
from tandem_shared.errors import FieldViolation, InvalidRequest
from tandem_shared.sampling_lists import (
    BIAS_LIMIT,
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    SamplingLists,
)
from tandem_shared.step_plan import Int32Array, WorkerInfo

MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024
MAX_STOP_STRINGS_LENGTH = 8192
"""The limit of all stop strings together, in characters."""
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORD_TEXTS = MAX_BAD_WORDS // 2
"""The most bad words of a request: each is spelled in up to two ways."""
MAX_BAD_WORD_LENGTH = 256
"""The limit of a bad word, in characters."""
IDS_AT_ONCE = 16_384
"""Ids that are read between two turns of the event loop; a few milliseconds."""


def check_lists(params: GenerationParams, vocab_size: int, violations: Violations) -> None:
    """Checks all but the elements of allowed_token_ids, and how bad words are spelled."""
    _check_strings("stopping.stop_strings", params.stop_strings, MAX_STOP_STRINGS, MAX_STOP_STRING_LENGTH, violations)
    if len(params.stop_strings) <= MAX_STOP_STRINGS:
        is_length = sum(map(len, params.stop_strings)) <= MAX_STOP_STRINGS_LENGTH
        violations.check(
            is_length, "stopping.stop_strings", f"must have {MAX_STOP_STRINGS_LENGTH} characters at most, all together"
        )
    _check_ids("stopping.stop_token_ids", params.stop_token_ids, MAX_STOP_TOKEN_IDS, vocab_size, violations)
    _check_bias(params, vocab_size, violations)
    _check_strings("sampling.bad_words", params.bad_words, MAX_BAD_WORD_TEXTS, MAX_BAD_WORD_LENGTH, violations)
    _check_length("sampling.allowed_token_ids", len(params.allowed_token_ids), MAX_ALLOWED_TOKEN_IDS, violations)
    field, ids = "output.logprob_token_ids", params.logprob_token_ids
    if _check_ids(field, ids, MAX_LOGPROB_TOKEN_IDS, vocab_size, violations):
        violations.check(len(set(ids)) == len(ids), field, "has a token twice")


async def read_lists(
    params: GenerationParams, encoder: TextEncoder, worker: WorkerInfo, violations: Violations
) -> SamplingLists:
    """What the request's lists ask of sampling, but for its grammar. check_lists() comes first; if it found anything,
    nothing more is read. Raises QueueFull and TextFailed where the bad words can't be tokenized.
    """
    if violations:
        return SamplingLists()
    # As in vLLM, end-of-sequence tokens are impossible before min_tokens whatever ignore_eos says.
    stops = {*params.stop_token_ids, *worker.eos_token_ids} if params.min_tokens else ()
    return SamplingLists(
        stop_token_ids=tuple(sorted(stops)),
        logit_bias=tuple(sorted(params.logit_bias.items())),
        allowed_token_ids=await _read_allowed(params, worker.vocab_size, violations),
        bad_words=await _read_bad_words(params.bad_words, encoder, worker.vocab_size, violations),
        logprob_token_ids=tuple(params.logprob_token_ids),
    )


async def check_token_ids(field: str, token_ids: Sequence[int], max_count: int, vocab_size: int) -> Int32Array:
    """The ids as an array. Raises InvalidRequest where there are too many, or one is not in the vocabulary."""
    if len(token_ids) > max_count:
        raise InvalidRequest(FieldViolation(field, f"{len(token_ids)} ids are more than {max_count}"))
    array = await _read_ids(token_ids)
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(outside):
        raise InvalidRequest(FieldViolation(field, f"{array[outside[0]]} is not in the vocabulary of {vocab_size}"))
    return array.astype(np.int32)


async def _read_ids(token_ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """Copies the ids in parts, between which the event loop has other turns."""
    array = np.empty(len(token_ids), np.int64)
    for start in range(0, len(token_ids), IDS_AT_ONCE):
        array[start : start + IDS_AT_ONCE] = token_ids[start : start + IDS_AT_ONCE]
        if start:
            await asyncio.sleep(0)
    return array


async def _read_allowed(params: GenerationParams, vocab_size: int, violations: Violations) -> tuple[int, ...]:
    if not params.allowed_token_ids:
        return ()
    try:
        ids = await check_token_ids(
            "sampling.allowed_token_ids", params.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS, vocab_size
        )
    except InvalidRequest as error:
        violations.add(*error.violations)
        return ()
    return tuple(np.unique(ids).tolist())


async def _read_bad_words(
    words: Sequence[str], encoder: TextEncoder, vocab_size: int, violations: Violations
) -> tuple[tuple[int, ...], ...]:
    """The token sequences of the words, without a space before them and with one."""
    if not words:
        return ()
    # Leading spaces are dropped, as the second spelling has one. A word of spaces alone stays as it is.
    bare = [word.lstrip(" ") or word for word in words]
    try:
        spelled = await encoder.encode_each("sampling.bad_words", [*bare, *(f" {word}" for word in bare)])
    except InvalidRequest as error:
        violations.add(*error.violations)
        return ()
    for index in range(len(words)):
        for ids in (spelled[index], spelled[index + len(words)]):
            is_right = 1 <= len(ids) <= MAX_BAD_WORD_TOKENS and max(ids) < vocab_size
            description = f"must be 1 to {MAX_BAD_WORD_TOKENS} tokens of the vocabulary"
            if not violations.check(is_right, f"sampling.bad_words[{index}]", description):
                break
    return tuple(dict.fromkeys(map(tuple, spelled)))


def _check_length(field: str, length: int, most: int, violations: Violations) -> bool:
    return violations.check(length <= most, field, f"must have {most} entries at most")


def _check_strings(field: str, texts: Sequence[str], most: int, longest: int, violations: Violations) -> None:
    if _check_length(field, len(texts), most, violations):
        for index, text in enumerate(texts):
            is_length = 1 <= len(text) <= longest
            violations.check(is_length, f"{field}[{index}]", f"must have 1 to {longest} characters")


def _check_ids(field: str, ids: Sequence[int], most: int, vocab_size: int, violations: Violations) -> bool:
    """Whether the list's length is right."""
    if not _check_length(field, len(ids), most, violations):
        return False
    for index, token_id in enumerate(ids):
        is_token = 0 <= token_id < vocab_size
        violations.check(is_token, f"{field}[{index}]", f"{token_id} is not in the vocabulary")
    return True


def _check_bias(params: GenerationParams, vocab_size: int, violations: Violations) -> None:
    if _check_length("sampling.logit_bias", len(params.logit_bias), MAX_LOGIT_BIAS, violations):
        for token_id, bias in params.logit_bias.items():
            field = f"sampling.logit_bias[{token_id}]"
            if violations.check(0 <= token_id < vocab_size, field, f"{token_id} is not in the vocabulary"):
                is_bias = -BIAS_LIMIT <= bias <= BIAS_LIMIT
                violations.check(is_bias, field, f"must be in [-{BIAS_LIMIT:g}, {BIAS_LIMIT:g}], is {bias}")
