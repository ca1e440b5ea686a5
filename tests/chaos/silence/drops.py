"""Packets between the services that are dropped silently. The worker runs on a host of its own, a network namespace,
and iptables drops packets to it and from it, TCP's retransmissions included.
"""

from tests.chaos.harness.definitions import Form, Part
from tests.chaos.silence.part import rows, run
from tests.e2e.hosts import why_no_hosts

ALL, ONE_WAY, ONE_CONNECTION = "packets dropped", "packets dropped one way", "connection forgotten"
PART = Part(
    "drops",
    run,
    rows,
    {
        Form.SHORT: [
            {
                "kinds": [ALL],
                "idle_kinds": [ONE_CONNECTION],
                "trials": 1,
                "seed": 1,
                "has_host": True,
                "num_streams": 8,
                "num_tokens": 100,
                "calm_s": 0.3,
            }
        ],
        Form.LONG: [{"kinds": [ALL, ONE_WAY, ONE_CONNECTION], "trials": 1, "seed": 1, "has_host": True}],
        Form.FULL: [
            {"kinds": [ALL, ONE_WAY, ONE_CONNECTION], "trials": 5, "seed": 11, "has_host": True},
            {"kinds": [], "idle_kinds": [ALL, ONE_WAY, ONE_CONNECTION], "trials": 4, "seed": 12, "has_host": True},
        ],
    },
    obstacle=why_no_hosts,
)
