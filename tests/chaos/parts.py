"""The parts of the harness, in the order of the table."""

from tests.chaos import drops, kills, mutations, silence
from tests.chaos.part import Part

PARTS: tuple[Part, ...] = (kills.PART, silence.PART, drops.PART, mutations.PART)
