"""Workers, gateways and schedulers that are killed or ended under HTTP streams.

Two gateways stand before one scheduler, and clients of both ask for answers of every kind (requests.py), beside clients
that speak gRPC. A killed worker shows only as a pause. A killed gateway costs its own clients their connections, and
the scheduler their sequences. A scheduler that went away shows as 503, and the gateways serve the next one. Nothing of
an answer is lost, repeated or changed.
"""

import contextlib
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

import grpc

from tests.chaos.gateways.load import HttpLoad
from tests.chaos.gateways.requests import KINDS
from tests.chaos.gateways.rows import rows
from tests.chaos.gateways.trials import TRIALS, Site
from tests.chaos.harness.definitions import Form, Found, Part
from tests.chaos.kills.part import left_in
from tests.chaos.support.engines import running_engine, tokenizer_folder
from tests.chaos.support.load import Load
from tests.e2e.gateway import GatewayProcess
from tests.e2e.waiting import wait_until

NUM_GATEWAYS = 2


def run(
    trials: Mapping[str, int],
    *,
    seed: int,
    clients: int = 20,
    tokens: int = 100,
    grpc_streams: int = 8,
    front_ends: int = 2,
    http_workers: int = 1,
) -> Found:
    """trials: the number of trials of each kind, in order. clients: of each gateway. tokens: the length of the shortest
    answers.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-chaos-")))
        flags = ["--api-server-count", str(front_ends), "--tokenizer", str(tokenizer_folder(folder))]
        engine = stack.enter_context(running_engine(scheduler_flags=flags))
        gateways = []
        for number in range(NUM_GATEWAYS):
            place = folder / str(number)
            place.mkdir()
            gateways.append(GatewayProcess(engine.scheduler.address, place, "--http-workers", str(http_workers)))
            # The gateway at this place may be another one by then.
            stack.callback(lambda number=number: gateways[number].kill())
        grpc_load = Load(
            engine.scheduler.address, grpc_streams, num_tokens=tokens, may_end=[grpc.StatusCode.UNAVAILABLE]
        )
        stack.enter_context(grpc_load)
        loads = [
            stack.enter_context(HttpLoad(each.url, clients, num_tokens=tokens, first_number=number * clients))
            for number, each in enumerate(gateways)
        ]
        for load in (grpc_load, *loads):
            load.start()
        rng = random.Random(seed)
        found = []
        for kind, count in trials.items():
            site = Site(engine, gateways, loads, grpc_load, rng)
            for _ in range(count):
                TRIALS[kind](site)
            seconds = {what: [round(each, 3) for each in times] for what, times in site.times.items()}
            found.append({"kind": kind, "count": count, **site.counts, "seconds": seconds, "faults": site.faults})
        for load in (grpc_load, *loads):
            load.finish()
        site.expect_no_endings("after all trials")
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not any(left_in(engine.load()).values()), "nothing is left", 10.0)
        left = left_in(engine.load())
        return {
            "trials": found,
            "kinds": list(KINDS),
            "http": [load.found for load in loads],
            "grpc": grpc_load.found,
            "left": left,
            "front_ends": front_ends,
            "http_workers": http_workers,
        }


PART = Part(
    "gateways",
    run,
    rows,
    {
        Form.SHORT: [
            {
                "trials": {"worker killed": 1, "gateway killed": 1, "scheduler killed": 1},
                "seed": 1,
                "clients": 10,
                "tokens": 40,
                "grpc_streams": 3,
                "front_ends": 0,
            }
        ],
        Form.LONG: [{"trials": dict.fromkeys(TRIALS, 1), "seed": 2, "tokens": 60, "http_workers": 2}],
        Form.FULL: [
            *({"trials": {"worker killed": 10}, "seed": 10 + number, "front_ends": number} for number in range(3)),
            {"trials": {"gateway killed": 10}, "seed": 20},
            {"trials": {"gateway killed": 10, "gateway's process killed": 10}, "seed": 21, "http_workers": 2},
            {"trials": {"gateway terminated": 10}, "seed": 22},
            {"trials": {"scheduler killed": 10}, "seed": 23},
            {"trials": {"scheduler killed": 5, "scheduler terminated": 5}, "seed": 24, "front_ends": 0},
            {"trials": {"scheduler terminated": 10}, "seed": 25, "http_workers": 2},
        ],
    },
)
