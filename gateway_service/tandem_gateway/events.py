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


def event(data: dict[str, Any], name: str = "") -> bytes:
    """One server-sent event."""
    text = _encode(data)
    return f"event: {name}\ndata: {text}\n\n".encode() if name else f"data: {text}\n\n".encode()


class TextEvents:
    """The events that make(text) makes, of which only the text changes."""

    def __init__(self, make: Callable[[str], bytes]) -> None:
        """make: gives an event that has the text once, as a JSON string."""
        # Whatever else is in the event, names given by a client included, does not contain it.
        placeholder = uuid.uuid4().hex
        self._before, self._after = make(placeholder).split(_encode(placeholder).encode())

    def of(self, text: str) -> bytes:
        return self._before + _encode(text).encode() + self._after
