"""The rows that hostile messages add to the table."""

from collections.abc import Sequence

from tests.chaos.harness.definitions import Found, Row
from tests.chaos.messages.findings import ANSWER, OTHERS, PROCESS, SESSION
from tests.chaos.messages.statuses import TABLE

MAX_GROWTH_MIB = 32
"""The most that a process's resident memory may grow after the warm-up. A leak of 4 KiB a message comes to more than
that over the 10,000 messages of a piece."""


def rows(pieces: Sequence[Found]) -> list[Row]:
    def total(name: str) -> int:
        return sum(piece[name] for piece in pieces)

    def wrong(sort: str) -> int:
        return sum(piece["wrong"].get(sort, 0) for piece in pieces)

    answers = {name for piece in pieces for name in piece["answers"]}
    num_rpcs = len({name.partition(" ")[0] for name in answers if name.startswith("/")})
    num_sessions = sum(n for piece in pieces for kind, n in piece["kinds"].items() if kind.startswith("session: "))
    polite = [piece["polite"] for piece in pieces]
    num_polite, num_ended = sum(each["answers"] for each in polite), sum(sum(each["ended"].values()) for each in polite)
    num_wrong = sum(each["wrong"] for each in polite)
    slowest = max(piece["slowest_probe_s"] for piece in pieces)
    growth = max(each for piece in pieces for each in piece["growth_mib"].values())
    num_messages = total("messages")
    return [
        Row(
            "whatever a message holds, it is answered with a status that its RPC may give: never UNKNOWN, and INTERNAL "
            "for no input",
            f"{num_messages} hostile messages to {num_rpcs} RPCs of both services",
            f"{wrong(ANSWER)} other answers",
            wrong(ANSWER) == 0 and num_rpcs >= len(TABLE) - 1,
        ),
        Row(
            "a step plan that can't be followed ends its session alone, whole, and the next one computes what is right",
            f"{num_sessions} sessions with a hostile message, {total('right_plans')} right plans before it",
            f"{wrong(SESSION)} with a wrong status or other tokens",
            wrong(SESSION) == 0 and total("right_plans") > 0,
        ),
        Row(
            "nobody else notices hostile messages: streams go on, liveness is answered",
            f"{num_polite} answers of streams beside them, {total('probes')} probes of both services",
            f"{num_wrong} wrong, {num_ended} ended, the slowest probe {slowest:.2f} s, {wrong(OTHERS)} other faults",
            num_polite > 0 and num_wrong == num_ended == wrong(OTHERS) == 0,
        ),
        Row(
            f"no message ends a process, costs the scheduler its worker or is kept: {MAX_GROWTH_MIB} MiB at most",
            f"{len(pieces)} worker and scheduler pairs, {num_messages // len(pieces)} messages each",
            f"{wrong(PROCESS)} processes ended or sessions lost; the most that one grew is {growth:.1f} MiB",
            wrong(PROCESS) == 0 and growth <= MAX_GROWTH_MIB,
        ),
    ]
