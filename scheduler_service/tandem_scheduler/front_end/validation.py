"""Checks a request, once, at the edge: plain parameters in, plain data out. All that is wrong is reported together.

Lengths are checked first: nothing that a client sends is read element by element, tokenized, hashed or quoted in an
error before its length is known to be allowed.
"""

import hashlib
import math
import uuid
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from tandem_scheduler.core.types import SequenceRequest
from tandem_scheduler.engine_interface import Submission
from tandem_scheduler.front_end.chat.chat_renderer import ChatRenderer
from tandem_scheduler.front_end.generation_params import GenerationParams
from tandem_scheduler.front_end.grammar_check import GrammarChecker
from tandem_scheduler.front_end.list_checks import check_lists, read_lists
from tandem_scheduler.front_end.prompt_reader import is_long, read_prompt
from tandem_scheduler.front_end.reply_size import REPLY_ADVICE, max_reply_size, max_report_size
from tandem_scheduler.front_end.text.encoder import TextEncoder
from tandem_scheduler.front_end.violations import Violations
from tandem_shared.errors import FieldViolation, InvalidRequest
from tandem_shared.sampling_fields import RowSampling, fields_out_of_range
from tandem_shared.sampling_lists import Grammar, problems
from tandem_shared.step_plan import WorkerInfo

MAX_CHOICES = 64
MAX_REQUEST_ID_BYTES = 256
MAX_CACHE_SALT_BYTES = 1024
MAX_QUOTED_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A checked request: its first choice, from which the others differ in their choice index alone."""

    request_id: str
    first: SequenceRequest
    num_choices: int
    fingerprint: str
    """The fingerprint of the worker that the request was checked against."""
    num_prompt_tokens: int
    stop_strings: tuple[str, ...]
    include_stop_string: bool
    skip_special_tokens: bool
    max_reply_bytes: int | None
    """The largest reply that the reader accepts; None if the output is streamed."""


def check_model(wanted: str, served: str) -> None:
    if wanted not in ("", served):
        raise InvalidRequest(FieldViolation("model", _not_served(wanted, served)))


def check_request_id(request_id: str) -> None:
    """Checks the id by which a live request is looked for. Raises InvalidRequest."""
    violations = Violations()
    _check_request_id(request_id, violations)
    violations.raise_any()


async def check_request(
    params: GenerationParams,
    encoder: TextEncoder,
    worker: WorkerInfo,
    served_model: str,
    grammars: GrammarChecker | None = None,
    chats: ChatRenderer | None = None,
) -> GenerationRequest:
    """Raises InvalidRequest with what is wrong; QueueFull and TextFailed where the prompt can't be tokenized. Without
    `grammars`, a request with a structured output is refused, and without `chats` one with a conversation.
    """
    violations = Violations()
    is_served = params.model in ("", served_model)
    violations.check(is_served, "model", "" if is_served else _not_served(params.model, served_model))
    _check_request_id(params.request_id, violations)
    sampling = _sampling_of(params, worker)
    _check_sampling(RowSampling(**sampling), violations)
    _check_output(params, violations)
    check_lists(params, worker.vocab_size, violations)
    _check_reply_size(params, worker, violations)
    lists = await read_lists(params, encoder, worker, violations)
    grammar = await _read_grammar(params, grammars, worker, violations)
    if is_long(params):
        _read_max_tokens(params, 0, worker, violations)
        violations.raise_any()
    prompt = await read_prompt(params, encoder, chats or ChatRenderer(None), worker, violations)
    max_tokens = _read_max_tokens(params, len(prompt), worker, violations)
    _check_prompt_reports(params, len(prompt), worker, violations)
    violations.raise_any()
    request_id = params.request_id or uuid.uuid4().hex
    if "seed" not in sampling:
        sampling["seed"] = xxhash.xxh64_intdigest(request_id.encode())
    # A grammar says itself whether its output may end, and an output that can't go on must end.
    eos_token_ids = () if params.ignore_eos and grammar is None else worker.eos_token_ids
    first = SequenceRequest(
        sequence_id=0,
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        sampling=RowSampling(**sampling),
        stop_token_ids=frozenset([*params.stop_token_ids, *eos_token_ids]),
        priority=params.priority or 0,
        cache_salt=_hashed(params.cache_salt, params.caller_salt),
        deadline=params.deadline,
        lists=replace(lists, grammar=grammar),
    )
    return GenerationRequest(
        request_id=request_id,
        first=first,
        num_choices=params.num_choices,
        fingerprint=worker.fingerprint,
        num_prompt_tokens=len(prompt),
        stop_strings=tuple(params.stop_strings),
        include_stop_string=params.include_stop_string,
        skip_special_tokens=params.skip_special_tokens,
        max_reply_bytes=params.max_reply_bytes,
    )


def check_submission(submission: Submission, worker: WorkerInfo | None) -> None:
    """Checks once more, for the engine, what would harm other requests if the front end had not checked it. Raises
    InvalidRequest.
    """
    violations, first, num_choices = Violations(), submission.first, submission.num_choices
    _check_num_choices(num_choices, violations)
    is_handle = submission.first_handle + num_choices <= 2**64
    violations.check(is_handle, "first_handle", "leaves too few handles for the choices")
    for problem in problems(first.lists, worker.vocab_size) if worker is not None else ():
        violations.add(FieldViolation("sampling", problem))
    _check_sampling(first.sampling, violations)
    ids = first.prompt_token_ids
    is_time = first.deadline is None or math.isfinite(first.deadline)
    violations.check(is_time, "deadline", f"must be finite, is {first.deadline}")
    is_known = worker is None or not len(ids) or (ids.min() >= 0 and ids.max() < worker.vocab_size)
    violations.check(is_known, "prompt.token_ids", "has an id that is not in the vocabulary")
    violations.raise_any()


async def _read_grammar(
    params: GenerationParams, grammars: GrammarChecker | None, worker: WorkerInfo, violations: Violations
) -> Grammar | None:
    if grammars is not None:
        return await grammars.read(params, worker, violations)
    violations.check(params.structured_output is None, "structured_output", "is not possible here")
    return None


def _not_served(wanted: str, served: str) -> str:
    return f"{_quoted(wanted)} is not served here; {served!r} is"


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]!r}..."


def _hashed(salt: str, caller_salt: bytes) -> str:
    """A short digest of both salts, as the prefix cache keeps it; empty if there is neither."""
    if not salt and not caller_salt:
        return ""
    return hashlib.blake2b(salt.encode(errors="surrogatepass"), digest_size=16, key=caller_salt).hexdigest()


def _is_short(text: str, max_bytes: int) -> bool:
    """Whether a text has max_bytes at most. A text that is much too long is not read."""
    return len(text) <= max_bytes and len(text.encode(errors="surrogatepass")) <= max_bytes


def _check_request_id(request_id: str, violations: Violations) -> None:
    if violations.check(
        _is_short(request_id, MAX_REQUEST_ID_BYTES), "request_id", f"must have {MAX_REQUEST_ID_BYTES} bytes at most"
    ):
        violations.check(request_id.isprintable(), "request_id", "must have printable characters only")


def _sampling_of(params: GenerationParams, worker: WorkerInfo) -> dict[str, Any]:
    """Fields of RowSampling: the request's, else the model's defaults. The others have RowSampling's own, which are the
    API's.
    """
    return {
        **worker.sampling_defaults,
        **params.sampling,
        "min_tokens": params.min_tokens,
        "num_logprobs": _num_logprobs(params),
        "num_prompt_logprobs": params.num_prompt_logprobs,
    }


def _num_logprobs(params: GenerationParams) -> int | None:
    """A request that asks for the log-probabilities of given tokens alone gets that of the sampled token too."""
    return 0 if params.num_logprobs is None and params.logprob_token_ids else params.num_logprobs


def _check_sampling(sampling: RowSampling, violations: Violations) -> None:
    for field in fields_out_of_range(sampling):
        violations.add(FieldViolation(field.path, field.problem(getattr(sampling, field.name))))


def _check_num_choices(num_choices: int, violations: Violations) -> None:
    violations.check(1 <= num_choices <= MAX_CHOICES, "num_choices", f"must be 1 to {MAX_CHOICES}, is {num_choices}")


def _check_output(params: GenerationParams, violations: Violations) -> None:
    _check_num_choices(params.num_choices, violations)
    violations.check(-(2**31) <= (params.priority or 0) < 2**31, "priority", "must be a number of 32 bits")
    violations.check(
        _is_short(params.cache_salt, MAX_CACHE_SALT_BYTES),
        "cache_salt",
        f"must have {MAX_CACHE_SALT_BYTES} bytes at most",
    )


def _read_max_tokens(
    params: GenerationParams, num_prompt_tokens: int, worker: WorkerInfo, violations: Violations
) -> int:
    room = worker.max_model_len - num_prompt_tokens
    field, limit, max_tokens = "stopping.max_tokens", worker.max_model_len, params.max_tokens
    if max_tokens is None:
        max_tokens = max(room, 0)
    else:
        violations.check(max_tokens >= 1, field, "must be 1 or more")
        violations.check(
            max_tokens <= room or room <= 0,
            field,
            f"{max_tokens} after {num_prompt_tokens} prompt tokens is beyond the context of {limit}",
        )
    is_least = params.min_tokens <= max_tokens or room <= 0
    violations.check(
        is_least, "stopping.min_tokens", f"{params.min_tokens} is more than the {max_tokens} that are possible"
    )
    return max_tokens


def _check_reply_size(params: GenerationParams, worker: WorkerInfo, violations: Violations) -> None:
    """Refuses a request whose own max_tokens lets the reply grow too large. If the context alone bounds the output, it
    will most likely end earlier, so nothing is refused beforehand.
    """
    limit = params.max_reply_bytes
    if limit is None or params.max_tokens is None or not 1 <= params.max_tokens <= worker.max_model_len:
        return
    num_logprobs, num_requested = _num_logprobs(params), len(params.logprob_token_ids)
    token_bytes = max_reply_size(worker.vocab_size, num_logprobs, num_requested)
    _check_size("stopping.max_tokens", params.num_choices * params.max_tokens * token_bytes, limit, violations)


def _check_prompt_reports(
    params: GenerationParams, num_prompt_tokens: int, worker: WorkerInfo, violations: Violations
) -> None:
    """Refuses a request whose prompt alone lets the reply grow too large by its log-probabilities."""
    if params.max_reply_bytes is not None and params.num_prompt_logprobs is not None:
        size = num_prompt_tokens * max_report_size(worker.vocab_size, params.num_prompt_logprobs)
        _check_size("output.num_prompt_logprobs", size, params.max_reply_bytes, violations)


def _check_size(field: str, size: int, limit: int, violations: Violations) -> None:
    violations.check(
        size <= limit,
        field,
        f"a reply of up to {size} bytes is more than the {limit} that may be sent at once: {REPLY_ADVICE}",
    )
