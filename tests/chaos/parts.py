"""The parts of the harness, in the order of the table."""

from tests.chaos import messages
from tests.chaos.part import Part

PARTS: tuple[Part, ...] = (messages.PART,)
