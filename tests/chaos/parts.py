"""The parts of the harness, in the order of the table."""

from tests.chaos import drops, kills, messages, mutations, restarts, silence, simulation
from tests.chaos.part import Part

PARTS: tuple[Part, ...] = (
    simulation.PART,
    kills.PART,
    silence.PART,
    drops.PART,
    restarts.PART,
    messages.PART,
    mutations.PART,
)
