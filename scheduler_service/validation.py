"""Requests, checked once, here at the edge: protobuf in, plain data out. All that is wrong is said at once."""

import math
import uuid
from dataclasses import dataclass

import numpy as np
import xxhash
from tokenizers import Tokenizer

from scheduler_service.core.types import SequenceRequest
from scheduler_service.tokenizer import encode
from shared.errors import FieldViolation, InvalidRequest
from shared.step_plan import Int32Array, RowSampling, WorkerInfo
from tandem.v1 import inference_pb2

MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024

AnyGenerateRequest = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request: its first choice, from which the others differ in their choice index alone."""

    request_id: str
    first: SequenceRequest
    num_choices: int
    fingerprint: str
    """Of the worker that it was checked against"""
    num_prompt_tokens: int
    stop_strings: tuple[str, ...]
    skip_special_tokens: bool


class _Violations:
    def __init__(self) -> None:
        self.found: list[FieldViolation] = []

    def check(self, is_right: bool, field: str, description: str) -> None:
        if not is_right:
            self.found.append(FieldViolation(field, description))

    def raise_any(self) -> None:
        if self.found:
            raise InvalidRequest(*self.found)


def check_model(wanted: str, served: str) -> None:
    if wanted and wanted != served:
        raise InvalidRequest(FieldViolation("model", _not_served(wanted, served)))


def _not_served(wanted: str, served: str) -> str:
    return f"{wanted!r} is not served here; {served!r} is"


async def check_request(
    request: AnyGenerateRequest, tokenizer: Tokenizer, worker: WorkerInfo, served_model: str
) -> GenerationRequest:
    """Raises InvalidRequest with every violation."""
    violations = _Violations()
    violations.check(request.model in ("", served_model), "model", _not_served(request.model, served_model))
    sampling = _read_sampling(request.sampling, worker, violations)
    stopping, output = request.stopping, request.output
    num_choices = request.num_choices if request.HasField("num_choices") else 1
    violations.check(1 <= num_choices <= MAX_CHOICES, "num_choices", f"must be 1 to {MAX_CHOICES}, is {num_choices}")
    violations.check(output.num_logprobs <= MAX_LOGPROBS, "output.num_logprobs", f"must be at most {MAX_LOGPROBS}")
    violations.check(
        len(stopping.stop_strings) <= MAX_STOP_STRINGS, "stopping.stop_strings", f"must be {MAX_STOP_STRINGS} at most"
    )
    for index, stop in enumerate(stopping.stop_strings):
        field = f"stopping.stop_strings[{index}]"
        violations.check(
            1 <= len(stop) <= MAX_STOP_STRING_LENGTH, field, f"must have 1 to {MAX_STOP_STRING_LENGTH} characters"
        )
    for index, token_id in enumerate(stopping.stop_token_ids):
        field = f"stopping.stop_token_ids[{index}]"
        violations.check(token_id < worker.vocab_size, field, f"{token_id} is not in the vocabulary")
    prompt = await _read_prompt(request.prompt, tokenizer, worker, violations)
    max_tokens = _read_max_tokens(stopping, len(prompt), worker, violations)
    violations.raise_any()
    request_id = request.request_id or uuid.uuid4().hex
    seed = request.sampling.seed if request.sampling.HasField("seed") else xxhash.xxh64_intdigest(request_id.encode())
    stop_token_ids = frozenset([*stopping.stop_token_ids, *(() if stopping.ignore_eos else worker.eos_token_ids)])
    first = SequenceRequest(
        sequence_id=0,
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        sampling=RowSampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
            num_logprobs=output.num_logprobs if output.HasField("num_logprobs") else None,
        ),
        stop_token_ids=stop_token_ids,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )
    return GenerationRequest(
        request_id=request_id,
        first=first,
        num_choices=num_choices,
        fingerprint=worker.fingerprint,
        num_prompt_tokens=len(prompt),
        stop_strings=tuple(stopping.stop_strings),
        skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
    )


def _read_sampling(
    sampling: inference_pb2.SamplingParams, worker: WorkerInfo, violations: _Violations
) -> inference_pb2.SamplingParams:
    """The request's parameters with the model's defaults, then the API's, where it has none."""
    defaults = {
        "temperature": (worker.default_temperature, 1.0),
        "top_k": (worker.default_top_k, 0),
        "top_p": (worker.default_top_p, 1.0),
        "min_p": (worker.default_min_p, 0.0),
    }
    full = inference_pb2.SamplingParams()
    full.CopyFrom(sampling)
    for name, (of_model, of_api) in defaults.items():
        if not sampling.HasField(name):  # type: ignore[arg-type]
            setattr(full, name, of_api if of_model is None else of_model)
    # Written so that NaN fails too.
    is_temperature = 0 <= full.temperature < math.inf
    violations.check(is_temperature, "sampling.temperature", f"must be 0 or more and finite, is {full.temperature}")
    violations.check(0 < full.top_p <= 1, "sampling.top_p", f"must be in (0, 1], is {full.top_p}")
    violations.check(0 <= full.min_p <= 1, "sampling.min_p", f"must be in [0, 1], is {full.min_p}")
    return full


async def _read_prompt(
    prompt: inference_pb2.Prompt, tokenizer: Tokenizer, worker: WorkerInfo, violations: _Violations
) -> Int32Array:
    has_text, has_ids = prompt.HasField("text"), prompt.HasField("token_ids")
    if has_text == has_ids:
        description = "has both text and token_ids" if has_text else "has neither text nor token_ids"
        violations.check(False, "prompt", description)
        return np.empty(0, np.int32)
    field = "prompt.text" if has_text else "prompt.token_ids"
    ids = await encode(tokenizer, prompt.text) if has_text else list(prompt.token_ids.ids)
    violations.check(len(ids) > 0, field, "is empty")
    outside = [token_id for token_id in ids if token_id >= worker.vocab_size]
    if outside:
        violations.check(False, field, f"{outside[0]} is not in the vocabulary of {worker.vocab_size}")
        return np.empty(0, np.int32)
    limit = worker.max_model_len
    violations.check(len(ids) < limit, field, f"{len(ids)} tokens leave no room for output in the context of {limit}")
    return np.array(ids, np.int32)


def _read_max_tokens(
    stopping: inference_pb2.StoppingCriteria, num_prompt_tokens: int, worker: WorkerInfo, violations: _Violations
) -> int:
    room = worker.max_model_len - num_prompt_tokens
    if not stopping.HasField("max_tokens"):
        return room
    field, limit = "stopping.max_tokens", worker.max_model_len
    violations.check(stopping.max_tokens >= 1, field, "must be 1 or more")
    violations.check(
        stopping.max_tokens <= room or room <= 0,
        field,
        f"{stopping.max_tokens} after {num_prompt_tokens} prompt tokens is beyond the context of {limit}",
    )
    return stopping.max_tokens
