"""The splitter of thinking against a regular expression that sees the whole text."""

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from tandem.commands.thinking import ThinkingSplitter

PARTS = st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "<", "think>", "</", "a", "é"]), max_size=12)


def expected(text: str) -> tuple[str, str]:
    """Thinking and answer of a whole text."""
    if not (match := re.fullmatch(r"\s*<think>[\r\n]*(.*?)(?:</think>[\r\n]*(.*))?", text, re.DOTALL)):
        return "", text
    return match[1], match[2] or ""


@given(PARTS, st.lists(st.integers(0, 60), max_size=10))
def test_thinking_is_told_apart_wherever_the_text_is_cut(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    splitter = ThinkingSplitter()
    pieces = [p for a, b in itertools.pairwise(places) for p in splitter.feed(text[a:b])]
    pieces += splitter.end()
    found = tuple("".join(piece for is_thinking, piece in pieces if is_thinking is kind) for kind in (True, False))
    assert found == expected(text)


def test_an_answer_is_shown_at_once() -> None:
    splitter = ThinkingSplitter()
    assert list(splitter.feed("Hel")) == [(False, "Hel")]
    splitter = ThinkingSplitter()
    assert [piece for text in ("<think>", "\n", "so", "</th", "ink>\n\n", "Hi") for piece in splitter.feed(text)] == [
        (True, "so"),
        (False, "Hi"),
    ]
