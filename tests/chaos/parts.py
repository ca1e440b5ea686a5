"""The parts of the harness, in the order of the table."""

from tests.chaos import folders, mutations, restarts
from tests.chaos.part import Part

PARTS: tuple[Part, ...] = (restarts.PART, folders.PART, mutations.PART)
