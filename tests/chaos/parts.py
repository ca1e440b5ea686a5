"""The parts of the harness, in the order of the table."""

from tests.chaos import kills, mutations
from tests.chaos.part import Part

PARTS: tuple[Part, ...] = (kills.PART, mutations.PART)
