"""Turns generate requests of the gRPC API into GenerationParams. Checks nothing and copies no repeated field."""

from collections.abc import Iterable

from tandem.v1 import inference_pb2
from tandem_scheduler.front_end.generation_params import GenerationParams, StructuredOutput
from tandem_shared.errors import FieldViolation, InvalidRequest
from tandem_shared.rpc.call_metadata import MAX_REPLY_BYTES_KEY
from tandem_shared.sampling_fields import REQUEST_FIELDS

DEFAULT_REPLY_BYTES = 4 * 1024 * 1024
"""gRPC's own default limit on the messages that a client accepts."""

MAX_REPLY_BYTES = 8 * 1024 * 1024
"""The largest reply, whatever the client accepts: a reply is in memory several times before it leaves, so larger
outputs have to be streamed."""

MAX_LIMIT_DIGITS = 12

SAMPLING_NAMES = tuple(field.name for field in REQUEST_FIELDS)

AnyGenerateRequest = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest


def params_of(
    request: AnyGenerateRequest, max_reply_bytes: int | None, deadline: float | None = None
) -> GenerationParams:
    """max_reply_bytes is None if the output is streamed. deadline is the call's, in seconds of time.monotonic()."""
    prompt, sampling, stopping, output = request.prompt, request.sampling, request.stopping, request.output
    return GenerationParams(
        prompt_text=prompt.text if prompt.HasField("text") else None,
        prompt_token_ids=prompt.token_ids.ids if prompt.HasField("token_ids") else None,
        request_id=request.request_id,
        model=request.model,
        sampling={name: getattr(sampling, name) for name in SAMPLING_NAMES if sampling.HasField(name)},  # type: ignore[arg-type]
        logit_bias=sampling.logit_bias,
        bad_words=sampling.bad_words,
        allowed_token_ids=sampling.allowed_token_ids,
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        min_tokens=stopping.min_tokens,
        stop_strings=stopping.stop_strings,
        include_stop_string=stopping.include_stop_string,
        stop_token_ids=stopping.stop_token_ids,
        ignore_eos=stopping.ignore_eos,
        skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
        num_logprobs=output.num_logprobs if output.HasField("num_logprobs") else None,
        num_prompt_logprobs=output.num_prompt_logprobs if output.HasField("num_prompt_logprobs") else None,
        logprob_token_ids=output.logprob_token_ids,
        structured_output=_form_of(request.structured_output) if request.HasField("structured_output") else None,
        num_choices=request.num_choices if request.HasField("num_choices") else 1,
        priority=request.priority,
        cache_salt=request.cache_salt,
        max_reply_bytes=max_reply_bytes,
        deadline=deadline,
    )


def _form_of(form: inference_pb2.StructuredOutput) -> StructuredOutput:
    return StructuredOutput(
        json_schema=form.json_schema if form.HasField("json_schema") else None,
        json_object=form.json_object,
        regex=form.regex if form.HasField("regex") else None,
        choice=form.choice.texts if form.HasField("choice") else None,
        lark=form.lark if form.HasField("lark") else None,
        start_after_token_id=form.start_after_token_id if form.HasField("start_after_token_id") else None,
    )


def reply_limit(metadata: Iterable[tuple[str, str | bytes]] | None) -> int:
    """The largest reply, in bytes, that the client accepts according to the call's metadata. Raises InvalidRequest."""
    for key, value in metadata or ():
        if key == MAX_REPLY_BYTES_KEY:
            is_number = isinstance(value, str) and value.isascii() and value.isdigit()
            if not is_number or len(value) > MAX_LIMIT_DIGITS:
                raise InvalidRequest(FieldViolation(MAX_REPLY_BYTES_KEY, "must be a number of bytes"))
            return min(int(value), MAX_REPLY_BYTES)
    return DEFAULT_REPLY_BYTES
