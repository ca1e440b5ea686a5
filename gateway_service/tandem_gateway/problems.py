"""What is wrong with a body, said by the names that its fields have in HTTP."""

import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError

from tandem_shared.errors import FieldViolation, InvalidRequest

Names = Mapping[str, str]

PARAMS = {
    "stop_strings": "stop",
    "include_stop_string": "include_stop_str_in_output",
    "num_logprobs": "logprobs",
    "num_prompt_logprobs": "prompt_logprobs",
    "num_choices": "n",
    "structured_output": "response_format",
}
"""The gRPC API's names of fields that HTTP has under another name."""

MAX_PROBLEMS = 10
MAX_PATH_CHARACTERS = 200

_TEXTS = {"model_attributes_type": "must be a JSON object", "missing": "is required"}
"""pydantic's type of error -> a text that needs no knowledge of pydantic."""


def refuse(param: str, description: str) -> InvalidRequest:
    """An error of the request's field `param`, by the name that the gRPC API has for it or the body's own."""
    return InvalidRequest(FieldViolation(param, description))


def name_params(request: Request, **names: str) -> None:
    """Says which names this request's body has, in errors, for fields that other routes or PARAMS call otherwise."""
    request.state.param_names = names


def violations_of(error: InvalidRequest, request: Request | None) -> list[FieldViolation]:
    """The violations by the names of the request's body."""
    names: Names = {} if request is None else getattr(request.state, "param_names", {})
    return [FieldViolation(_param(each.field, names), each.description) for each in error.violations]


def problems_of(error: RequestValidationError) -> list[FieldViolation]:
    """The problems of a body that has the wrong types, at most MAX_PROBLEMS of them.

    Where a value may have one of several types, pydantic tells what keeps it from each. Only what was found deepest in
    the value is kept, as that is about the type that was meant.
    """
    if isinstance(error.body, bytes) and error.body:
        return [FieldViolation("", "the body must be JSON, with the header Content-Type: application/json")]
    found = {(_path(each, error.body), _text(each)): None for each in error.errors()}
    outer = {path[:length] for path, _ in found for length in range(len(path))}
    return [FieldViolation(_shown(path), text) for path, text in found if path not in outer][:MAX_PROBLEMS]


def _param(field: str, names: Names) -> str:
    """The body's name of a field of the gRPC API, such as "top_p" of "sampling.top_p"."""
    field = re.sub(r"^(sampling|stopping|output|prompt\.chat)\.", "", field)
    field = re.sub(r"^prompt\.(text|token_ids)\b", "prompt", field)
    field = re.sub(r"\b(tool_calls\[\d+\])\.(name|arguments)\b", r"\1.function.\2", field)
    match = re.match(r"\w*", field)
    assert match is not None
    name, rest = PARAMS.get(match[0], match[0]), field[match.end() :]
    if name == "messages" and name in names:
        # Other lists are made messages of, whose numbers the client does not know.
        rest = ""
    return names.get(name, name) + rest


def _path(problem: Any, body: Any) -> tuple[str | int, ...]:
    """Where a problem is, without the names that pydantic has for the types that a value may have."""
    path: list[str | int] = []
    location = problem["loc"][1:]
    for part in location:
        if _has(body, part):
            path.append(part)
            body = body[part]
    if problem["type"] == "missing" and location:
        path.append(location[-1])
    return tuple(path)


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _text(problem: Any) -> str:
    location = problem["loc"][1:]
    if problem["type"] == "json_invalid":
        return f"the body is no JSON: {problem['ctx']['error']}, at character {location[0]}"
    if not location:
        return "there is no body" if problem["type"] == "missing" else "the body must be a JSON object"
    return str(_TEXTS.get(problem["type"], problem["msg"]))


def _shown(path: tuple[str | int, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".")[:MAX_PATH_CHARACTERS]
