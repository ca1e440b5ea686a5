"""Reasoning and calls of tools are found in a chat's output, however it is cut into deltas."""

import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_gateway.output_parser import (
    MAX_HEAD_CHARACTERS,
    CallArguments,
    CallStart,
    Content,
    OutputParser,
    Piece,
    Reasoning,
)

MODES = ("think", "opened", "none")


@dataclass
class Found:
    """What the pieces of an output add up to."""

    reasoning: str
    content: str
    calls: list[tuple[str, str]]


def found(pieces: list[Piece]) -> Found:
    result = Found("", "", [])
    for piece in pieces:
        assert isinstance(piece, CallStart) or piece.text, "a piece without text"
        if isinstance(piece, Reasoning):
            assert not result.content and not result.calls
            result.reasoning += piece.text
        elif isinstance(piece, Content):
            result.content += piece.text
        elif isinstance(piece, CallStart):
            assert piece.index == len(result.calls)
            result.calls.append((piece.name, ""))
        else:
            assert isinstance(piece, CallArguments) and piece.index == len(result.calls) - 1
            name, arguments = result.calls[-1]
            result.calls[-1] = (name, arguments + piece.text)
    return result


def parse(deltas: list[str], *, reasoning: str = "think", has_tools: bool = True) -> Found:
    parser = OutputParser(reasoning=reasoning, has_tools=has_tools)
    return found([piece for delta in deltas for piece in parser.feed(delta)] + parser.finish())


def whole(text: str, **options: Any) -> Found:
    return parse([text], **options)


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'


FRAGMENTS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {', '"}', "}", "\n", " ",
    "<", "</", "th",
    "tool_call>", '"', "\\", "é", '{"name": "f"}', '{"arguments": {}, "name": "g"}', "x",
)  # fmt: skip


@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=14),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    reasoning=st.sampled_from(MODES),
    has_tools=st.booleans(),
)
def test_the_pieces_of_any_text_do_not_depend_on_how_it_is_cut(
    fragments: list[str], cuts: list[int], reasoning: str, has_tools: bool
) -> None:
    text = "".join(fragments)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    deltas = [text[start:end] for start, end in itertools.pairwise(places)]
    expected = whole(text, reasoning=reasoning, has_tools=has_tools)
    assert parse(deltas, reasoning=reasoning, has_tools=has_tools) == expected
    assert parse(list(text), reasoning=reasoning, has_tools=has_tools) == expected


WORDS = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["</tool_call>", '"}', "{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    thought=st.none() | WORDS,
    content=st.none() | WORDS,
    calls=st.lists(st.tuples(WORDS, st.dictionaries(st.text(max_size=4), VALUES, max_size=3)), max_size=3),
    size=st.integers(1, 9),
)
def test_what_a_model_writes_as_its_template_shows_is_found(
    thought: str | None, content: str | None, calls: list[tuple[str, dict[str, Any]]], size: int
) -> None:
    parts = [part for part in [content] if part]
    parts += [call(name, json.dumps(arguments)) for name, arguments in calls]
    text = ("" if thought is None else f"<think>\n{thought}\n</think>\n\n") + "\n".join(parts)
    result = parse([text[start : start + size] for start in range(0, len(text), size)])
    assert result.reasoning == (thought or "")
    assert result.content == (content or "")
    assert [(name, json.loads(arguments)) for name, arguments in result.calls] == calls


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Found("", "", [])),
        ("plain\n", Found("", "plain\n", [])),
        ("  <think>a</think>b", Found("a", "b", [])),
        ("<think>\n\n</think>\n\nb", Found("", "b", [])),
        ("<think>cut", Found("cut", "", [])),
        ("<think>cut</thi", Found("cut</thi", "", [])),
        ("<thin", Found("", "<thin", [])),
        ("a <think>b</think>", Found("", "a <think>b</think>", [])),
        ("a<tool_call>no call</tool_call>b", Found("", "a<tool_call>no call</tool_call>b", [])),
        ('<tool_call>{"name": "f"}</tool_call>', Found("", "", [("f", "{}")])),
        ('<tool_call>{"name": 3}</tool_call>', Found("", '<tool_call>{"name": 3}</tool_call>', [])),
        ('<tool_call>{"parameters": {"a": 1}, "name": "f"}</tool_call>', Found("", "", [("f", '{"a": 1}')])),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', Found("", "", [("f", '{"a": 1')])),
        ('<tool_call>{"name": "f", "argu', Found("", '<tool_call>{"name": "f", "argu', [])),
        (call("f", "{}") + " \n" + call("g", "{}") + "\n", Found("", "", [("f", "{}"), ("g", "{}")])),
        (call("f", "{}")[:-12] + call("g", "{}"), Found("", "", [("f", "{}"), ("g", "{}")])),
        (call("f", "{}") + "and so on", Found("", "and so on", [("f", "{}")])),
    ],
)
def test_texts_and_what_is_in_them(text: str, expected: Found) -> None:
    assert whole(text) == expected
    assert parse(list(text)) == expected


def test_without_tools_calls_are_content_and_without_reasoning_thoughts_are() -> None:
    text = "<think>a</think>" + call("f", "{}")
    assert whole(text, reasoning="none", has_tools=False) == Found("", text, [])
    assert whole("a\n</think>\n\nb", reasoning="opened") == Found("a", "b", [])


def test_what_never_becomes_a_call_is_given_out_after_a_while() -> None:
    text = "<tool_call>" + "x" * (2 * MAX_HEAD_CHARACTERS)
    parser = OutputParser(has_tools=True)
    assert found(parser.feed(text)) == Found("", text, [])
    deltas = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    assert parse(deltas) == Found("", text, [])


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    parser = OutputParser(has_tools=True)
    assert parser.feed("<think>\nHm") == [Reasoning("Hm")]
    assert parser.feed(" </th") == [Reasoning(" ")]
    assert parser.feed("ink>\n\nSo") == [Content("So")]
    assert parser.feed(" it is. <tool") == [Content(" it is.")]
    assert parser.feed('_call>\n{"name": "f", "arguments": {"a') == [CallStart(0, "f"), CallArguments(0, '{"a')]
