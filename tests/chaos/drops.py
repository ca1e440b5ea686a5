"""Packets between the services that are dropped without a word: the worker runs on a host of its own, a network
namespace, and iptables drops what goes to it and what comes from it. What TCP sends again meanwhile is dropped too.
"""

from tests.chaos.part import Form, Part
from tests.chaos.silence import rows, run
from tests.e2e.hosts import why_no_hosts

BOTH, ONE = "packets dropped", "packets dropped one way"
PART = Part(
    "drops",
    run,
    rows,
    {
        Form.SHORT: [
            {
                "kinds": [BOTH],
                "trials": 1,
                "seed": 1,
                "has_host": True,
                "num_streams": 8,
                "num_tokens": 100,
                "calm_s": 0.3,
            }
        ],
        Form.LONG: [{"kinds": [BOTH, ONE], "trials": 1, "seed": 1, "has_host": True}],
        Form.FULL: [
            {"kinds": [BOTH, ONE], "trials": 10, "seed": 11, "has_host": True},
            {"kinds": [BOTH, ONE], "trials": 10, "seed": 12, "has_host": True, "is_busy": False},
        ],
    },
    obstacle=why_no_hosts,
)
