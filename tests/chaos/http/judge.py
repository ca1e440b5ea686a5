"""What a gateway may answer: the table of statuses in docs/http.md, and the form of its errors."""

import json
from collections.abc import Collection

from tandem_gateway.errors import TYPES
from tests.chaos.http.exchange import Reply

OF_BODIES = frozenset({200, 400, 404, 409})
OF_INPUT = OF_BODIES | {401, 405, 408, 413}
"""What may answer bodies on the right paths, and any input: 404 for another model's name, 409 for an id that another
body has too. Other statuses need a server that is busy or restarting.
"""
KEYS = {"message", "type", "param", "code"}


class WrongReply(Exception):
    """A reply that is not in the table, or not in its form."""


def check(reply: Reply, allowed: Collection[int], *, method: str = "POST") -> None:
    """Raises WrongReply."""
    if reply.status not in allowed:
        raise WrongReply(f"{reply.status}: {reply.body[:300]!r}")
    names = [name for name, _ in reply.headers]
    if "x-evil" in names:
        raise WrongReply("a header that was smuggled in")
    if method == "HEAD":
        return
    if reply.status != 200:
        _check_error(reply.status, reply.body)
    elif dict(reply.headers).get("content-type", "").startswith("text/event-stream"):
        _check_events(reply)
    elif dict(reply.headers).get("content-type") == "application/json":
        # NaN is no JSON, though Python reads it.
        json.loads(reply.body, parse_constant=_refuse_constant)


def _refuse_constant(text: str) -> None:
    raise WrongReply(f"{text} in an answer, which is no JSON")


def _check_error(status: int, body: bytes) -> None:
    try:
        said = json.loads(body)
        error = said["error"]
        is_right = set(said) == {"error"} and set(error) == KEYS and isinstance(error["message"], str)
    except (ValueError, LookupError, TypeError):
        is_right = False
    if not is_right or not error["message"]:
        raise WrongReply(f"{status} without an error in OpenAI's form: {body[:300]!r}")
    if error["type"] != TYPES.get(status, "invalid_request_error"):
        raise WrongReply(f"{status} with the type {error['type']}")
    if status == 404 and error["code"] == "model_not_found" and error["param"] != "model":
        raise WrongReply(f"404 for {error['param']}")


def _check_events(reply: Reply) -> None:
    for event in reply.events(parse_constant=_refuse_constant):
        if (error := event.get("error")) and error["type"] != TYPES[400]:
            raise WrongReply(f"a stream that ended with {error}")
    if b"data: [DONE]" not in reply.body and b"response." not in reply.body and b"event: error" not in reply.body:
        raise WrongReply(f"a stream without its end: {reply.body[-300:]!r}")
