"""Finds reasoning and calls of tools in the text of a chat's output, while it comes.

The forms are Qwen3's: `<think>`, reasoning, `</think>` at the start, and anywhere after it calls of the form that
Hermes introduced:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

What is found depends on the text alone, not on how it was cut into deltas: whatever may be the start of a tag, or space
that a tag would make meaningless, is held back until more text decides. So the pieces of a stream, joined, are the
pieces of the whole text.

As in Qwen3's chat template, line breaks around reasoning belong to neither reasoning nor content. Space before and
between calls, and after the last one, is no content. A call's arguments are given out as they come, once the name is
known and they begin with a brace. What looks like a call and is none is content, with its tags. Arguments are what the
model wrote: if max_tokens ends the output within them, they are incomplete.
"""

import json
import re
from dataclasses import dataclass
from typing import TypeAlias

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"

MAX_HEAD_CHARACTERS = 65536
"""A call whose name and the start of whose arguments come later than this is taken for content. It bounds how often the
same text is searched.
"""

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL)
"""A call up to its arguments. The group is the name, as JSON."""
_TAIL = re.compile(f"{CALL}|{END_CALL}")


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallStart:
    """The start of a call. Its arguments follow as CallArguments of the same index, from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    index: int
    text: str


Piece: TypeAlias = Reasoning | Content | CallStart | CallArguments


class OutputParser:
    """The text of one choice."""

    def __init__(self, *, reasoning: str = "think", has_tools: bool = False) -> None:
        """reasoning: "think" if the text may start with <think>, "opened" if it starts within reasoning, "none" if
        there is none. has_tools: whether calls of tools are looked for.
        """
        self._has_tools = has_tools
        self._step = {"think": self._start, "opened": self._reasoning_start, "none": self._content}[reasoning]
        self._buffer = ""
        self._is_whole = False
        self._pieces: list[Piece] = []
        self._depth = 0
        self._is_in_string = self._is_escaped = False
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """The pieces that the text's next part makes certain."""
        self._buffer += text
        # A step returns whether it came to another state, in which what is left may mean more.
        while self._step():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[Piece]:
        """The last pieces, at the end of the text."""
        self._is_whole = True
        return self.feed("")

    def _start(self) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(THINK):
            self._buffer = text.removeprefix(THINK)
            self._step = self._reasoning_start
        elif self._is_whole or not THINK.startswith(text):
            self._step = self._content
        else:
            return False
        return True

    def _reasoning_start(self) -> bool:
        self._buffer = self._buffer.lstrip("\n")
        if not self._buffer:
            return False
        self._step = self._reasoning
        return True

    def _reasoning(self) -> bool:
        before, tag, after = self._buffer.partition(END_THINK)
        if tag:
            self._emit(Reasoning(before.rstrip("\n")))
            self._buffer = after
            self._step = self._after_reasoning
            return True
        text = before if self._is_whole else before[: len(before) - _held(before, END_THINK)]
        text = text.rstrip("\n")
        self._emit(Reasoning(text))
        self._buffer = "" if self._is_whole else self._buffer[len(text) :]
        return False

    def _after_reasoning(self) -> bool:
        self._buffer = self._buffer.lstrip("\n")
        if not self._buffer:
            return False
        self._step = self._content
        return True

    def _content(self) -> bool:
        before, tag, after = self._buffer.partition(CALL) if self._has_tools else (self._buffer, "", "")
        if tag:
            self._emit(Content(before.rstrip()))
            self._buffer = after
            self._step = self._call
            return True
        if not self._has_tools:
            text = before
        elif self._is_whole:
            text = before.rstrip() if self.num_calls else before
            before = text
        else:
            text = before[: len(before) - _held(before, CALL)].rstrip()
        self._emit(Content(text))
        self._buffer = before[len(text) :]
        return False

    def _call(self) -> bool:
        end = self._buffer.find(END_CALL, 0, MAX_HEAD_CHARACTERS + len(END_CALL))
        head = _HEAD.match(self._buffer, 0, end if end >= 0 else MAX_HEAD_CHARACTERS)
        name = _name(head[1]) if head else None
        if head and name is not None:
            self._emit_start(name)
            self._buffer = self._buffer[head.end() :]
            self._depth, self._is_in_string, self._is_escaped = 0, False, False
            self._step = self._arguments
        elif end >= 0:
            text, self._buffer = self._buffer[:end], self._buffer[end + len(END_CALL) :]
            self._emit_whole_call(text)
            self._step = self._content
        elif self._is_whole or len(self._buffer) >= MAX_HEAD_CHARACTERS + len(END_CALL):
            self._emit(Content(CALL))
            self._step = self._content
        else:
            return False
        return True

    def _arguments(self) -> bool:
        end = self._end_of_arguments()
        text = self._buffer if end is None else self._buffer[:end]
        if text:
            self._pieces.append(CallArguments(self.num_calls - 1, text))
        self._buffer = self._buffer[len(text) :]
        if end is None:
            return False
        self._step = self._after_call
        return True

    def _end_of_arguments(self) -> int | None:
        """Where the JSON object that is being read ends in the buffer. None if it does not end in it."""
        for position, character in enumerate(self._buffer):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string:
                self._is_escaped = character == "\\"
                self._is_in_string = character != '"'
            elif character == '"':
                self._is_in_string = True
            elif character == "{":
                self._depth += 1
            elif character == "}":
                self._depth -= 1
                if not self._depth:
                    return position + 1
        return None

    def _after_call(self) -> bool:
        # A model may forget the closing tag, and open the next call.
        tag = _TAIL.search(self._buffer)
        if tag is None:
            self._buffer = self._buffer[len(self._buffer) - _held(self._buffer, CALL, END_CALL) :]
            return False
        self._buffer = self._buffer[tag.end() :]
        self._step = self._call if tag[0] == CALL else self._content
        return True

    def _emit(self, piece: Reasoning | Content) -> None:
        if piece.text:
            self._pieces.append(piece)

    def _emit_start(self, name: str) -> None:
        self._pieces.append(CallStart(self.num_calls, name))
        self.num_calls += 1

    def _emit_whole_call(self, text: str) -> None:
        """A call whose parts are in another order, or what is none."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
            is_call = isinstance(name, str) and isinstance(arguments, dict)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            is_call = False
        if not is_call:
            self._emit(Content(CALL + text + END_CALL))
            return
        self._emit_start(name)
        self._pieces.append(CallArguments(self.num_calls - 1, json.dumps(arguments, ensure_ascii=False)))


def _held(text: str, *tags: str) -> int:
    """The length of the longest end of the text that is the start of a tag."""
    longest = max(map(len, tags)) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0


def _name(text: str) -> str | None:
    """A name that is written as JSON, or None if it is no JSON."""
    try:
        return str(json.loads(text, strict=False))
    except ValueError:
        return None
