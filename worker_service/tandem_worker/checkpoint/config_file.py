"""Reads the keys of a model folder's JSON files. What is wrong in a file is a ModelError that names file and key."""

import math
import reprlib
from pathlib import Path
from typing import Any, TypeVar

from tandem_shared.errors import ModelError
from tandem_shared.model_folder import read_json

T = TypeVar("T", list[Any], dict[str, Any])

MAX_NUMBER = 1e15
MAX_SIZE = 2**24
"""The largest size that is read: more than ten times that of any known model. float32 counts positions exactly up to
it.
"""

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 200
brief = _shortened.repr
"""Like repr(), but short however large or deep the value is."""


class ConfigFile:
    """Reads the keys of one file, or of `values`, an object in it, where that is given.

    null counts as a key that is left out. The methods raise ModelError where a value is not what they say.
    """

    def __init__(self, path: Path, values: dict[str, Any] | None = None) -> None:
        self.path = path
        self.values = read_json(path) if values is None else values

    def fail(self, key: str, problem: str) -> ModelError:
        """An error, to be raised, that names the file and the key."""
        return ModelError(f"{self.path}: {key}: {problem}")

    def part(self, values: dict[str, Any]) -> "ConfigFile":
        """A reader of `values`, which stand in the same file."""
        return ConfigFile(self.path, values)

    def number(
        self, key: str, default: float | None = None, *, minimum: float = 0.0, maximum: float = MAX_NUMBER
    ) -> float:
        """A number above zero and within the limits."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(key, "is missing")
        # "not value > 0" is true of NaN too.
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.fail(key, f"must be a positive number, is {brief(value)}")
        if not minimum <= value <= maximum:
            raise self.fail(key, f"must be {minimum} to {maximum}, is {brief(value)}")
        return value

    def whole(self, key: str, default: int | None = None, *, maximum: int = MAX_SIZE) -> int:
        """A whole number above zero."""
        value = self.number(key, default, maximum=maximum)
        if value != math.floor(value):
            raise self.fail(key, f"must be a whole number, is {value!r}")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, is {brief(value)}")
        return value

    def typed(self, key: str, kind: type[T]) -> T:
        """The key's list or object; an empty one where it is left out."""
        value = self.values.get(key)
        value = kind() if value is None else value
        if not isinstance(value, kind):
            raise self.fail(key, f"must be a {kind.__name__}, is {brief(value)}")
        return value
