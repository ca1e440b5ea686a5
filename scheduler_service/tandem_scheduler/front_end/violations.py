"""Collects what is wrong with a request, so that all of it is reported together."""

from tandem_shared.errors import FieldViolation, InvalidRequest

MAX_VIOLATIONS = 10
"""The most violations that are reported. The others are only counted."""


class Violations:
    """The violations of one request, in the order in which they were found."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []
        self._num_untold = 0

    def __bool__(self) -> bool:
        return bool(self._found)

    def check(self, is_right: bool, field: str, description: str) -> bool:
        """Adds a violation unless is_right, which is returned."""
        if not is_right:
            self.add(FieldViolation(field, description))
        return is_right

    def add(self, *violations: FieldViolation) -> None:
        for violation in violations:
            if len(self._found) < MAX_VIOLATIONS:
                self._found.append(violation)
            else:
                self._num_untold += 1

    def raise_any(self) -> None:
        """Raises InvalidRequest if there are violations."""
        if self._num_untold:
            self._found.append(FieldViolation("", f"and {self._num_untold} more"))
        if self._found:
            raise InvalidRequest(*self._found)
