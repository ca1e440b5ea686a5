"""Services that are told to end, or are killed, under an unending load, and are started again.

An orderly end (Drain, SIGTERM) loses no accepted stream, and no stream notices that a worker was replaced. If a
scheduler or a front end is killed, its clients get UNAVAILABLE, and the same request, sent again with the same id, gets
its whole answer. A service that ended leaves no process behind.
"""

import contextlib
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

import grpc

from tests.chaos.harness.definitions import Form, Found, Part
from tests.chaos.restarts.rows import rows
from tests.chaos.restarts.serve import Serve
from tests.chaos.restarts.site import Site
from tests.chaos.restarts.trials import TRIALS
from tests.chaos.support.engines import random_model
from tests.chaos.support.load import Load
from tests.e2e.services import Engine

STREAMS_PER_CONNECTION = 3


def run(
    trials: Mapping[str, int],
    *,
    seed: int,
    streams: int = 24,
    tokens: int = 150,
    front_ends: int = 2,
    drain_grace_s: float = 60.0,
    tp_size: int = 1,
) -> Found:
    """trials: the number of trials of each kind, in order; trials of `tandem serve` cannot be mixed with others.
    tokens: the length of the shortest stream.
    """
    # Fewer rows than sequences, so that accepted streams wait for their first token when the end comes.
    flags = ["--api-server-count", str(front_ends), "--drain-grace-s", str(drain_grace_s)]
    flags += ["--max-num-seqs", str(streams * 2 // 3)]
    worker_flags = ["--tp-size", str(tp_size)]
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(random_model())
        services: Engine | Serve
        if "serve terminated" in trials or "serve killed" in trials:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-chaos-"))
            services = Serve(model, [*flags, *worker_flags], Path(folder, "log"))
            address = services.address
        else:
            services = Engine(model, scheduler_flags=flags, worker_flags=worker_flags)
            address = services.scheduler.address
        stack.callback(services.close)
        load = Load(
            address,
            streams,
            num_tokens=tokens,
            may_end=[grpc.StatusCode.UNAVAILABLE],
            num_connections=-(-streams // STREAMS_PER_CONNECTION),
        )
        stack.enter_context(load)
        load.start()
        rng = random.Random(seed)
        found = [try_out(Site(model, load, rng), services, kind, count) for kind, count in trials.items()]
        load.finish()
        return {"trials": found, "front_ends": front_ends, "tp_size": tp_size, "load": load.found}


def try_out(site: Site, services: Engine | Serve, kind: str, count: int) -> Found:
    for _ in range(count):
        TRIALS[kind](site, services)
    seconds = {what: [round(each, 3) for each in times] for what, times in site.times.items()}
    return {"kind": kind, "count": count, **site.counts, "seconds": seconds, "faults": site.faults}


PART = Part(
    "restarts",
    run,
    rows,
    {
        Form.SHORT: [
            {
                "trials": {"drain": 1, "scheduler terminated": 1, "worker restarted": 1, "scheduler killed": 1},
                "seed": 1,
                "streams": 12,
                "tokens": 100,
            }
        ],
        Form.LONG: [
            {
                "trials": {
                    "drain": 1,
                    "scheduler terminated": 2,
                    "worker restarted": 1,
                    "supervisor killed": 1,
                    "scheduler killed": 1,
                    "front end killed": 2,
                },
                "seed": 2,
                "streams": 18,
            },
            {"trials": {"grace passed": 2}, "seed": 3, "streams": 18, "front_ends": 0, "drain_grace_s": 0.3},
            {"trials": {"serve terminated": 1, "serve killed": 1}, "seed": 4, "streams": 12},
        ],
        Form.FULL: [
            {"trials": {"drain": 10}, "seed": 10},
            {"trials": {"scheduler terminated": 10}, "seed": 11},
            {"trials": {"scheduler terminated": 10, "drain": 5}, "seed": 12, "front_ends": 0},
            {"trials": {"grace passed": 10}, "seed": 13, "drain_grace_s": 0.3},
            {"trials": {"grace passed": 5}, "seed": 14, "front_ends": 0, "drain_grace_s": 0.3},
            {"trials": {"worker restarted": 10}, "seed": 15, "streams": 48},
            {"trials": {"supervisor killed": 10}, "seed": 16},
            {"trials": {"scheduler killed": 10}, "seed": 17},
            {"trials": {"scheduler killed": 10}, "seed": 18, "front_ends": 0},
            {"trials": {"front end killed": 10}, "seed": 19},
            {"trials": {"front end killed": 10}, "seed": 20, "front_ends": 3},
            {"trials": {"serve terminated": 10}, "seed": 21, "streams": 12},
            {"trials": {"serve killed": 10}, "seed": 22, "streams": 12},
            {"trials": {"serve terminated": 5, "serve killed": 5}, "seed": 23, "streams": 12, "tp_size": 2},
        ],
    },
)
