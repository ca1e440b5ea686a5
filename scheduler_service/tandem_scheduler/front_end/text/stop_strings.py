"""Finds the first of several strings to be complete in a text that comes in parts.

An Aho-Corasick automaton (1975). It has a node for each prefix of a string: the text read so far ends with that prefix,
and with no longer one. A node's fallback is the longest shorter prefix with which the text ends too. A character costs
about one look-up however many strings there are and however long, so that no request's stop strings hold up the step
loop. The automaton is built once for a request; each choice has its own node.
"""

import re
from collections import deque
from collections.abc import Sequence

START = 0


class StopStrings:
    """The automaton. Its nodes are numbers; START is the empty prefix."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """No string may be empty."""
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [START]
        self._depth = [0]
        # The longest string that is complete at a node.
        self._complete: list[str | None] = [None]
        for stop in stop_strings:
            self._add(stop)
        self._link()
        firsts = "".join(map(re.escape, self._next[START]))
        self._first_character = re.compile(f"[{firsts}]") if firsts else None

    def __bool__(self) -> bool:
        return bool(self._next[START])

    def held(self, node: int) -> int:
        """The length of the longest prefix of a string with which the text ends, in characters."""
        return self._depth[node]

    def find(self, text: str, node: int) -> tuple[int, str | None, int]:
        """Reads text from a node on: the node after it, and where a string was complete, that string, the longest if
        there are several, and the position after it. Reads no further then.
        """
        position = 0
        while position < len(text):
            if node == START:
                # Most text is far from any string.
                candidate = self._first_character.search(text, position) if self._first_character else None
                if candidate is None:
                    break
                position = candidate.start()
            node = self._step(node, text[position])
            position += 1
            if (stop := self._complete[node]) is not None:
                return node, stop, position
        return node, None, len(text)

    def pass_over(self, text: str, node: int) -> int:
        """Reads text from a node on, whatever strings are complete in it. Returns the node after it, from which a
        string that began in this text can still become complete.
        """
        for character in text:
            node = self._step(node, character)
        return node

    def _step(self, node: int, character: str) -> int:
        while (following := self._next[node].get(character)) is None and node != START:
            node = self._fallback[node]
        return START if following is None else following

    def _add(self, stop: str) -> None:
        node = START
        for character in stop:
            following = self._next[node].get(character)
            if following is None:
                following = self._next[node][character] = len(self._next)
                self._next.append({})
                self._fallback.append(START)
                self._depth.append(self._depth[node] + 1)
                self._complete.append(None)
            node = following
        self._complete[node] = stop

    def _link(self) -> None:
        """Breadth first, so that a fallback, which is shorter, is ready before its node."""
        waiting = deque(self._next[START].values())
        while waiting:
            node = waiting.popleft()
            for character, following in self._next[node].items():
                fallback = self._fallback[following] = self._step(self._fallback[node], character)
                if self._complete[following] is None:
                    self._complete[following] = self._complete[fallback]
                waiting.append(following)
