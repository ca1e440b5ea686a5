"""Server-sent events as bytes.

Most events of a stream differ from the one before in a short text alone. So whatever surrounds that text is made once
(TextEvents), and what is left to do for an event is to escape its text.
"""

import json
import uuid
from collections.abc import Callable
from typing import Any

DONE = b"data: [DONE]\n\n"

# json.dumps would make an encoder for every event.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encoded(data: Any) -> bytes:
    """JSON as bytes. Half a surrogate pair, which JSON can have and UTF-8 can't, is written as JSON's escape of it."""
    return _encode(data).encode(errors="backslashreplace")


def event(data: dict[str, Any], name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\ndata: ".encode() if name else b"data: "
    return head + encoded(data) + b"\n\n"


class TextEvents:
    """The events that make(text) makes, of which only the text changes."""

    def __init__(self, make: Callable[[str], bytes]) -> None:
        """make: gives an event that has the text once, as a JSON string."""
        # Whatever else is in the event, names given by a client included, does not contain it.
        placeholder = uuid.uuid4().hex
        self._before, self._after = make(placeholder).split(encoded(placeholder))

    def of(self, text: str) -> bytes:
        return self._before + encoded(text) + self._after
