"""The parts of the harness, in the order of the table."""

from tests.chaos import admission, overload
from tests.chaos.part import Part

PARTS: tuple[Part, ...] = (overload.PART, admission.PART)
