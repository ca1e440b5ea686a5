"""The parts of the harness, in the order of the table."""

from tests.chaos.admission import part as admission
from tests.chaos.folders import part as folders
from tests.chaos.gateways import part as gateways
from tests.chaos.harness.definitions import Part
from tests.chaos.http import part as http
from tests.chaos.intruders import part as intruders
from tests.chaos.kills import part as kills
from tests.chaos.messages import part as messages
from tests.chaos.mutations import part as mutations
from tests.chaos.overload import part as overload
from tests.chaos.restarts import part as restarts
from tests.chaos.silence import drops
from tests.chaos.silence import part as silence
from tests.chaos.simulation import part as simulation
from tests.chaos.soak import part as soak

PARTS: tuple[Part, ...] = (
    simulation.PART,
    kills.PART,
    silence.PART,
    drops.PART,
    restarts.PART,
    gateways.PART,
    messages.PART,
    http.PART,
    intruders.PART,
    overload.PART,
    admission.PART,
    soak.PART,
    folders.PART,
    mutations.PART,
)
