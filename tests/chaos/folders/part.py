"""Hostile model folders, loaded as both services do when they start: each is served, or refused by an error that names
the file. Nothing hangs, crashes, ends in a traceback or is read from outside the folder.
"""

import contextlib
import random
from collections.abc import Sequence

from tests.chaos.folders.cases import fixed_cases
from tests.chaos.folders.random_changes import random_change
from tests.chaos.folders.trials import Reader, changed, command_faults, faults_in, valid_folder
from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.support.load import MAX_FAULTS


def run(*, fixed: bool, mutations: int = 0, commands: int = 0, seed: int = 0) -> Found:
    """fixed: whether to try the fixed list. mutations: the number of random changes. commands: the number of cases of
    the fixed list, chosen at random, with which the real commands are started.
    """
    faults: list[str] = []
    num_refused = 0
    cases, rng = fixed_cases(), random.Random(seed)
    with valid_folder() as valid, contextlib.closing(Reader()) as reader:
        answer = reader.read(valid)
        assert not isinstance(answer, str) and answer["worker"] == answer["scheduler"] == ["served", ""], answer
        for number, case in enumerate(cases if fixed else ()):
            with changed(valid, f"fixed-{number}") as folder:
                case.change(folder)
                faults += [f"{case.title}: {fault}" for fault in faults_in(reader.read(folder), folder, case.named)]
        for number in range(mutations):
            with changed(valid, f"random-{number}") as folder:
                name = random_change(folder, rng)
                answer = reader.read(folder)
                num_refused += (
                    isinstance(answer, dict) and [answer["worker"][0], answer["scheduler"][0]] != ["served"] * 2
                )
                faults += [f"random {number} of {name}: {fault}" for fault in faults_in(answer, folder, None)]
        for case in rng.sample(cases, commands):
            with changed(valid, "command") as folder:
                case.change(folder)
                faults += [f"{case.title}: {fault}" for fault in command_faults(folder, case.named)]
    return {
        "fixed": len(cases) if fixed else 0,
        "mutations": mutations,
        "refused_mutations": num_refused,
        "commands": commands,
        "num_faults": len(faults),
        "faults": faults[:MAX_FAULTS],
    }


def rows(pieces: Sequence[Found]) -> list[Row]:
    sums = {name: sum(piece[name] for piece in pieces) for name in ("fixed", "mutations", "refused_mutations")}
    commands = sum(piece["commands"] for piece in pieces)
    num_faults = sum(piece["num_faults"] for piece in pieces)
    examples = [fault for piece in pieces for fault in piece["faults"]]
    return [
        Row(
            "a hostile model folder is refused by an error that names its file, or served: no traceback, no hang, no "
            "crash, and nothing outside the folder is read",
            f"{sums['fixed']} hostile folders and {sums['mutations']} random changes of a valid one, {commands} of "
            "them with the real commands",
            f"{num_faults} faults{f', such as: {examples[0]}' if examples else ''}; {sums['refused_mutations']} of the "
            "random ones refused",
            not num_faults and sums["fixed"] + sums["mutations"] > 0,
        )
    ]


PART = Part(
    "folders",
    run,
    rows,
    {
        Form.SHORT: [{"fixed": True}],
        Form.LONG: [{"fixed": True, "commands": 2, "mutations": 300, "seed": 1}],
        Form.FULL: [
            {"fixed": True, "commands": 20, "seed": 2},
            *({"fixed": False, "mutations": 500, "seed": seed} for seed in (3, 4, 5, 6)),
        ],
    },
)
