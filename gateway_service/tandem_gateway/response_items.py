"""The output of a response as items, and the events that tell of them while they come.

The items stand in the order in which the model wrote them: reasoning, a message, calls of functions.
"""

import uuid
from typing import Any

from tandem_gateway.conversation import new_call_id
from tandem_gateway.output_parser import CallArguments, CallStart, Piece, Reasoning

Event = dict[str, Any]


class ResponseItems:
    """Pieces of an output become items."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        """All items. The last one may be under way."""
        self._text = ""
        self._is_open = False

    def take(self, piece: Piece) -> list[Event]:
        """The events of a piece."""
        if isinstance(piece, CallStart):
            call = {"call_id": new_call_id(), "name": piece.name, "arguments": ""}
            return [*self.close("completed"), *self._open("function_call", "fc", call)]
        if isinstance(piece, CallArguments):
            return [self._delta("response.function_call_arguments.delta", piece.text)]
        if isinstance(piece, Reasoning):
            events = self._continue("reasoning", "rs", {"summary": [], "content": []}, "reasoning_text")
            return [*events, self._delta("response.reasoning_text.delta", piece.text, content_index=0)]
        events = self._continue("message", "msg", {"role": "assistant", "content": []}, "output_text")
        return [*events, self._delta("response.output_text.delta", piece.text, content_index=0, logprobs=[])]

    def close(self, status: str) -> list[Event]:
        """The events that end the item that is under way, if one is. status: "completed" or "incomplete"."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        done: list[Event]
        if item["type"] == "function_call":
            item["arguments"] = self._text
            done = [self._event("response.function_call_arguments.done", arguments=self._text, name=item["name"])]
        else:
            part = _part("reasoning_text" if item["type"] == "reasoning" else "output_text", self._text)
            item["content"] = [part]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            name = f"response.{part['type']}.done"
            done = [
                self._event(name, content_index=0, text=self._text, **more),
                self._event("response.content_part.done", content_index=0, part=part),
            ]
        index = len(self.items) - 1
        return [*done, {"type": "response.output_item.done", "output_index": index, "item": dict(item)}]

    def _continue(self, kind: str, prefix: str, fields: dict[str, Any], part: str) -> list[Event]:
        """The events that begin an item of this kind, unless one is under way."""
        if self._is_open and self.items[-1]["type"] == kind:
            return []
        events = [*self.close("completed"), *self._open(kind, prefix, fields)]
        return [*events, self._event("response.content_part.added", content_index=0, part=_part(part, ""))]

    def _open(self, kind: str, prefix: str, fields: dict[str, Any]) -> list[Event]:
        item = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", **fields}
        self.items.append(item)
        self._text, self._is_open = "", True
        return [{"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)}]

    def _delta(self, name: str, text: str, **fields: Any) -> Event:
        self._text += text
        return self._event(name, delta=text, **fields)

    def _event(self, name: str, /, **fields: Any) -> Event:
        return {"type": name, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


def _part(kind: str, text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": kind, "text": text}
    return {**part, "annotations": [], "logprobs": []} if kind == "output_text" else part
