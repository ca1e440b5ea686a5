"""The fields of a gRPC request made from the body of an HTTP request: what completions and chats have in common."""

import json
from typing import Any

from tandem.calls import params_fields
from tandem.sampling_params import SamplingParams
from tandem.structured_output import StructuredOutput
from tandem.v1 import inference_pb2
from tandem_gateway.engine import Fields
from tandem_gateway.problems import refuse
from tandem_gateway.protocol import GenerationBody, ResponseFormat
from tandem_shared.errors import InvalidRequest
from tandem_shared.sampling_fields import REQUEST_FIELDS

SAME_NAMES = (
    *(field.name for field in REQUEST_FIELDS),
    "n", "logit_bias", "bad_words", "allowed_token_ids", "min_tokens", "stop", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "prompt_logprobs", "skip_special_tokens",
)  # fmt: skip
"""The fields of bodies that SamplingParams has under the same name."""

MIN_SEED = -(2**63)
"""OpenAI's and vLLM's seeds are signed. The negative ones are seeds like others."""

GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
"""vLLM's older names of forms -> the fields of StructuredOutput."""


def request_fields(
    body: GenerationBody,
    prompt: Fields,
    request_id: str,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    form: StructuredOutput | None,
) -> Fields:
    """Raises InvalidRequest, naming the fields, for values that no server takes."""
    values: dict[str, Any] = {name: getattr(body, name) for name in SAME_NAMES}
    # vLLM and OpenAI take an empty list for none.
    values["allowed_token_ids"] = values["allowed_token_ids"] or None
    if body.seed is not None and MIN_SEED <= body.seed < 0:
        values["seed"] = body.seed % 2**64
    params = SamplingParams(**values, max_tokens=max_tokens, logprobs=logprobs, structured_outputs=form)
    return {
        "model": body.model,
        "prompt": prompt,
        **params_fields(params),
        "request_id": request_id,
        "priority": body.priority,
        "cache_salt": body.cache_salt,
    }


def form_of(body: GenerationBody) -> StructuredOutput | None:
    """The form that the body asks for, by whichever name. Raises InvalidRequest if it asks for several."""
    forms: dict[str, dict[str, Any]] = {}
    if (given := body.structured_outputs) is not None:
        for name in given.model_extra or ():
            raise refuse(f"structured_outputs.{name[:100]}", "is unknown")
        values = {"json": given.json_, **given.model_dump(include={"json_object", "regex", "choice", "grammar"})}
        forms["structured_outputs"] = values
    for name, field in GUIDED.items():
        if getattr(body, name) is not None:
            forms[name] = {field: getattr(body, name)}
    if body.response_format is not None and body.response_format.type != "text":
        forms["response_format"] = _response_form(body.response_format)
    if len(forms) > 1:
        raise refuse(list(forms)[1], f"is one form too many beside {next(iter(forms))}")
    if not forms:
        return None
    [(name, fields)] = forms.items()
    try:
        return StructuredOutput(**fields)
    except InvalidRequest as error:
        raise refuse(name, "; ".join(each.description for each in error.violations)) from error


def form_name(body: GenerationBody) -> str:
    """The name by which the body asks for a form, for errors."""
    given = (name for name in ("structured_outputs", *GUIDED) if getattr(body, name) is not None)
    return next(given, "response_format")


def _response_form(wanted: ResponseFormat) -> dict[str, Any]:
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise refuse("response_format.json_schema.schema", "is required with the type json_schema")
    return {"json": json.dumps(wanted.json_schema.schema_)}


def usage_of(usages: list[inference_pb2.Usage]) -> dict[str, Any]:
    """OpenAI's usage of one request, which may have several prompts."""
    num_prompt = sum(each.num_prompt_tokens for each in usages)
    num_output = sum(each.num_output_tokens for each in usages)
    # OpenAI counts a prompt once; the gRPC API counts cached tokens for each choice.
    num_cached = sum(min(each.num_cached_tokens, each.num_prompt_tokens) for each in usages)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def is_plain(message: inference_pb2.GenerateStreamResponse) -> bool:
    """Whether a message of a stream has nothing beyond text and tokens for its choice."""
    return not (message.HasField("finish") or message.HasField("usage") or message.logprobs or message.prompt_logprobs)


def stop_reason_of(finish: inference_pb2.Finish, body: GenerationBody) -> str | int | None:
    """vLLM's stop_reason: the stop string, or the one of stop_token_ids, that ended the output. Else None."""
    if finish.HasField("stop_string"):
        return str(finish.stop_string)
    if finish.HasField("stop_token_id") and finish.stop_token_id in (body.stop_token_ids or ()):
        return int(finish.stop_token_id)
    return None
