"""The whole scheduler in virtual time, with faults at random moments. `world.py` says what a world holds.

A step is counted when the core takes a result of the worker.
"""

import itertools
from collections import Counter
from collections.abc import Sequence

from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.simulation.faults import FAULTS
from tests.chaos.simulation.virtual_time import run_virtually
from tests.chaos.simulation.worker import FLAWS
from tests.chaos.simulation.world import World

STEPS_PER_WORLD = 500
MAX_FAULTS = 20

EVENTS = (
    *FAULTS,
    *FLAWS,
    "loss in the trial of an innocent",
    "results lost",
    "plans refused, then results",
    "stop string found after the end",
    "preemptions",
    "prefix hits",
    "full hits",
    "overshoots",
    "prompt reported",
    "prompt reported in parts",
    *(
        f"answered: {feature}"
        for feature in (
            "stop string",
            "stop string in the text",
            "stop id",
            "length",
            "abort",
            "several choices",
            "log-probabilities",
            "prompt log-probabilities",
            "penalties",
            "lists",
            "min_tokens",
            "salt",
            "priority",
            "seeded",
        )
    ),
    *(
        f"ended: {explanation}"
        for explanation in (
            "checked against another model",
            "deadline passed",
            "draining",
            "id in use",
            "listener raised",
            "outgrown",
            "poisonous",
            "queue full",
            "refused before the first worker",
            "refused without a worker",
            "row fault",
            "grammar that fails",
            "no token left",
            "sink raised",
            "stalled",
            "stopped",
            "too large",
            "worker away",
        )
    ),
)
"""Events of which each must happen at least once in every form."""


def simulate(seed: int) -> World:
    return run_virtually(World(seed, STEPS_PER_WORLD).run())


def run(first_seed: int, num_steps: int) -> Found:
    """Runs worlds of successive seeds until they have taken num_steps steps, or MAX_FAULTS faults were found."""
    events: Counter[str] = Counter()
    faults: list[str] = []
    steps = calls = 0
    seconds = 0.0
    for seed in itertools.count(first_seed):
        world = simulate(seed)
        events += world.events
        steps += world.num_steps
        calls += len(world.calls)
        seconds += world.seconds
        faults += [f"seed {seed} {fault}" for fault in world.failures]
        if steps >= num_steps or len(faults) >= MAX_FAULTS:
            return {
                "seeds": [first_seed, seed],
                "wanted_steps": num_steps,
                "steps": steps,
                "calls": calls,
                "virtual_hours": round(seconds / 3600, 1),
                "events": dict(sorted(events.items())),
                "faults": faults[:MAX_FAULTS],
            }
    raise AssertionError("unreachable")


def rows(pieces: Sequence[Found]) -> list[Row]:
    events: Counter[str] = Counter()
    for piece in pieces:
        events.update(piece["events"])
    faults = [fault for piece in pieces for fault in piece["faults"]]
    steps, calls = (sum(piece[name] for piece in pieces) for name in ("steps", "calls"))
    num_seeds = sum(piece["seeds"][1] - piece["seeds"][0] + 1 for piece in pieces)
    hours = sum(piece["virtual_hours"] for piece in pieces)
    missing = [event for event in EVENTS if not events[event]]
    num_broken = sum(events[fault] for fault in FAULTS) + sum(events[flaw] for flaw in FLAWS)
    ended = sum(count for event, count in events.items() if event.startswith("ended: "))
    tried = (
        f"simulation in virtual time, worlds of {num_seeds} seeds: {steps:,} steps in {hours:.1f} hours, {calls:,} "
        f"calls, {num_broken:,} faults of {len(FAULTS) + len(FLAWS)} kinds"
    )
    found = (
        f"{events['answers']:,} whole answers, {ended:,} errors that a fault explains, {len(faults)} ends, tokens, "
        f"texts or books that were wrong"
    )
    if missing:
        found += f"; never happened: {', '.join(missing)}"
    is_met = not faults and not missing and all(piece["steps"] >= piece["wanted_steps"] for piece in pieces)
    promise = (
        "each accepted request ends once, with its true answer or an error that says what broke, and after every step "
        "the books of scheduler, hub and front ends balance"
    )
    return [Row(promise, tried, found, is_met)]


PART = Part(
    "simulation",
    run,
    rows,
    pieces={
        Form.SHORT: [{"first_seed": 0, "num_steps": 50_000}],
        Form.LONG: [{"first_seed": 1_000 * piece, "num_steps": 50_000} for piece in range(1, 3)],
        Form.FULL: [{"first_seed": 10_000 * piece, "num_steps": 100_000} for piece in range(1, 11)],
    },
)
