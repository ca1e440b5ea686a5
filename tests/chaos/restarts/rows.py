"""The rows that the trials of restarts add to the table."""

from collections.abc import Sequence

from tests.chaos.harness.definitions import Found, Row, trials_by_kind

PROMISES = {
    "drain": "Drain: accepted streams end whole, new ones get UNAVAILABLE with RetryInfo, then it returns",
    "scheduler terminated": "SIGTERM to the scheduler: accepted streams end whole, exit status 0, no process left",
    "grace passed": "SIGTERM, and the grace passes: what is left ends UNAVAILABLE, exit status 0, no process left",
    "worker restarted": "rolling restarts of the worker (SIGTERM, exit status 0, a new one): no stream notices",
    "supervisor killed": "the worker's supervisor killed with -9: its worker goes too, and no stream notices",
    "scheduler killed": "scheduler killed with -9: clients get UNAVAILABLE, no process left, a retry has its answer",
    "front end killed": "front end killed with -9: its own clients alone get UNAVAILABLE, a retry has its answer",
    "serve terminated": "SIGTERM to `tandem serve`: accepted streams end whole, exit status 0, no process left",
    "serve killed": "`tandem serve` killed with -9: clients get UNAVAILABLE, no process left, a retry has its answer",
}
MUST_HAPPEN = {
    "drain": ("whole", "refused"),
    "scheduler terminated": ("whole", "refused"),
    "grace passed": ("cut",),
    "scheduler killed": ("cut",),
    "front end killed": ("cut",),
    "serve terminated": ("whole", "refused"),
    "serve killed": ("cut",),
}
"""What must have been counted at least once per trial on average, or the trials showed nothing."""
WORDS = {
    "whole": "streams ended whole during it",
    "refused": "calls refused",
    "cut": "streams cut off",
    "late": "from the last token to its reply",
    "ended": "from the last token to the end",
    "noticed": "until all clients knew",
    "longest gap": "longest gap between tokens",
}


def rows(pieces: Sequence[Found]) -> list[Row]:
    found = trials_by_kind(pieces)
    return [_row(kind, found[kind]) for kind in PROMISES if kind in found]


def _row(kind: str, trials: Sequence[Found]) -> Row:
    count = sum(trial["count"] for trial in trials)
    faults = [fault for trial in trials for fault in (*trial["faults"], *trial["piece"]["load"]["faults"])]
    sums = {name: sum(trial.get(name, 0) for trial in trials) for name in ("whole", "refused", "cut")}
    seen = [f"{number} {WORDS[name]}" for name, number in sums.items() if number]
    for what in ("late", "ended", "noticed", "longest gap"):
        times = [each for trial in trials for each in trial["seconds"].get(what, [])]
        if times:
            seen.append(f"{WORDS[what]}: {max(times):.2f} s at most")
    streams = sorted({trial["piece"]["load"]["streams"] for trial in trials})
    front_ends = sorted({trial["piece"]["front_ends"] for trial in trials})
    return Row(
        PROMISES[kind],
        f"{count} times under {' or '.join(map(str, streams))} streams, "
        f"with {' or '.join(map(str, front_ends))} front-end processes",
        "; ".join([f"{len(faults)} faults{f', such as: {faults[0]}' if faults else ''}", *seen]),
        not faults and all(sums[name] >= count for name in MUST_HAPPEN.get(kind, ())),
    )
