"""The rows that the trials of gateways add to the table."""

from collections.abc import Sequence

from tests.chaos.harness.definitions import Found, Row, trials_by_kind

PROMISES = {
    "worker killed": "A killed worker ends no HTTP stream, and loses, doubles or changes nothing of an answer",
    "gateway killed": "gateway killed with -9: its own clients alone lose their connections, its requests are aborted, "
    "and a retry has its answer",
    "gateway's process killed": "one process of a gateway killed with -9: only its clients notice, it is replaced, and "
    "a retry has its answer",
    "gateway terminated": "SIGTERM to a gateway: open calls end whole, exit status 0, and other gateways go on",
    "scheduler killed": "scheduler killed with -9 behind gateways: 503, as a status or as a stream's last event; the "
    "same gateways serve the next one",
    "scheduler terminated": "SIGTERM to the scheduler behind gateways: open calls end whole, new ones get 503 with "
    "Retry-After; the same gateways serve the next one",
}
MUST_HAPPEN = {
    "worker killed": ("open",),
    "gateway killed": ("cut",),
    "gateway's process killed": ("cut",),
    "gateway terminated": ("refused",),
    "scheduler killed": ("cut", "refused"),
    "scheduler terminated": ("refused",),
}
"""What must have been counted at least once per trial on average, or the trials showed nothing."""
WORDS = {"open": "calls were open", "cut": "streams cut off", "refused": "calls refused or cut off before an event"}
TIMES = {
    "noticed": "until all clients knew",
    "aborted": "until its sequences were gone",
    "answers": "until each client had an answer",
}


def rows(pieces: Sequence[Found]) -> list[Row]:
    found = trials_by_kind(pieces)
    return [_row(kind, found[kind]) for kind in PROMISES if kind in found]


def _row(kind: str, trials: Sequence[Found]) -> Row:
    count = sum(trial["count"] for trial in trials)
    pieces = [trial["piece"] for trial in trials]
    loads = [load for piece in pieces for load in (*piece["http"], piece["grpc"])]
    faults = [fault for each in (*trials, *loads) for fault in each["faults"]]
    left = [f"{number} {what}" for piece in pieces for what, number in piece["left"].items() if number]
    sums = {name: sum(trial.get(name, 0) for trial in trials) for name in WORDS}
    seen = [f"{number} {WORDS[name]}" for name, number in sums.items() if number]
    for name, words in TIMES.items():
        if times := [each for trial in trials for each in trial["seconds"].get(name, [])]:
            seen.append(f"{words}: {max(times):.2f} s at most")
    clients = max(sum(load["clients"] for load in piece["http"]) for piece in pieces)
    answers = sum(load["answers"] for piece in pieces for load in piece["http"])
    grpc_streams = max(piece["grpc"]["streams"] for piece in pieces)
    problems = [*faults, *left]
    return Row(
        PROMISES[kind],
        f"{count} times under {clients} HTTP clients of {len(pieces[0]['http'])} gateways ({len(pieces[0]['kinds'])} "
        f"kinds of completions, chats and responses, streams and unary calls) and {grpc_streams} gRPC streams; in the "
        f"pieces with these trials {answers:,} HTTP answers were compared",
        "; ".join([f"{len(problems)} faults{f', such as: {problems[0]}' if problems else ''}", *seen]),
        not problems and answers > 0 and all(sums[name] >= count for name in MUST_HAPPEN[kind]),
    )
