"""Collections for tests of limits: whatever reads an element before the length is checked fails."""

from collections.abc import Iterator, Sequence
from typing import Any


class Unreadable(Sequence[Any]):
    """A sequence that has a length and fails when an element is read."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("an element was read")

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the elements were read")


class UnreadableMapping(Unreadable):
    items = keys = values = Unreadable.__iter__
