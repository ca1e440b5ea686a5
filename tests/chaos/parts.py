"""The parts of the harness, in the order of the table."""

from tests.chaos import admission, overload, soak
from tests.chaos.part import Part

PARTS: tuple[Part, ...] = (overload.PART, admission.PART, soak.PART)
