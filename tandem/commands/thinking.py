"""Tells what a model thinks from what it answers, while the text arrives in pieces that may be cut anywhere."""

from collections.abc import Iterator

OPENING, CLOSING = "<think>", "</think>"


class ThinkingSplitter:
    """Takes a text of the form "<think>thoughts</think>answer", where the tags and what is between may be missing. The
    tags are nowhere in what comes out, nor are the line ends after them.
    """

    def __init__(self) -> None:
        self._tag = OPENING
        """The tag that may come next; empty if none may."""
        self._is_thinking = False
        self._held = ""
        """The end of the text so far, which may be the start of the tag."""
        self._is_after_tag = False
        """Whether nothing but line ends has come since a tag."""

    def feed(self, text: str) -> Iterator[tuple[bool, str]]:
        """Yields pieces of the text, and of each whether it is thinking."""
        self._held += text
        if self._tag == OPENING:
            # Only at the start of the text it is a tag. White space before it belongs to nothing.
            start = self._held.lstrip()
            if start != OPENING and OPENING.startswith(start):
                return
            if start.startswith(OPENING):
                self._held, self._tag = start.removeprefix(OPENING), CLOSING
                self._is_thinking = self._is_after_tag = True
            else:
                self._tag = ""
        if self._tag and (before := self._held.partition(CLOSING))[1]:
            yield from self._piece(before[0])
            self._held, self._tag = before[2], ""
            self._is_thinking, self._is_after_tag = False, True
        num_held = next((size for size in range(len(self._tag) - 1, 0, -1) if self._held.endswith(self._tag[:size])), 0)
        end = len(self._held) - num_held
        piece, self._held = self._held[:end], self._held[end:]
        yield from self._piece(piece)

    def end(self) -> Iterator[tuple[bool, str]]:
        """Yields what is left when the text has ended."""
        piece, self._held = self._held, ""
        yield from self._piece(piece)

    def _piece(self, text: str) -> Iterator[tuple[bool, str]]:
        if self._is_after_tag:
            text = text.lstrip("\r\n")
        if text:
            self._is_after_tag = False
            yield self._is_thinking, text
