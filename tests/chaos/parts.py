"""The parts of the harness, in the order of the table."""

from tests.chaos import (
    admission,
    drops,
    folders,
    intruders,
    kills,
    messages,
    mutations,
    overload,
    restarts,
    silence,
    simulation,
    soak,
)
from tests.chaos.part import Part

PARTS: tuple[Part, ...] = (
    simulation.PART,
    kills.PART,
    silence.PART,
    drops.PART,
    restarts.PART,
    messages.PART,
    intruders.PART,
    overload.PART,
    admission.PART,
    soak.PART,
    folders.PART,
    mutations.PART,
)
