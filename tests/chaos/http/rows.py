"""The rows that hostile HTTP adds to the table."""

from collections import Counter
from collections.abc import Sequence

from tests.chaos.harness.definitions import Found, Row
from tests.chaos.messages.findings import ANSWER, OTHERS, PROCESS

MAX_GROWTH_MIB = 32


def rows(pieces: Sequence[Found]) -> list[Row]:
    wrong: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    manners: Counter[str] = Counter()
    for piece in pieces:
        wrong.update(piece["wrong"])
        answers.update(piece["answers"])
        manners.update(piece["manners"])
    faults = [fault for piece in pieces for fault in piece["faults"]]
    shown = f", such as: {faults[0][:500]}" if faults else ""
    num_polite = sum(piece["polite"]["answers"] for piece in pieces)
    growth = max(max(piece["growth_mib"].values()) for piece in pieces)
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(answers.items()))
    return [
        Row(
            "whatever comes over HTTP is answered with a status of docs/http.md and an error in OpenAI's form, and 500 "
            "is the answer to no input",
            f"{sum(piece['requests'] for piece in pieces)} hostile requests: bodies made from the gateway's OpenAPI "
            f"document, request lines, headers, framing and pipelines, and clients of bad manners ("
            f"{', '.join(f'{count} {name}' for name, count in manners.items())})",
            f"{wrong[ANSWER]} wrong answers{shown}; {statuses}",
            not wrong[ANSWER] and len(answers) > 3,
        ),
        Row(
            "well-behaved clients of the same gateway do not notice hostile HTTP",
            f"{num_polite} answers of streams and unary calls beside it, compared with the truth",
            f"{wrong[OTHERS]} wrong or ended",
            not wrong[OTHERS] and num_polite > 0,
        ),
        Row(
            "hostile HTTP leaves nothing behind: no connection, no sequence, no traceback, and "
            f"{MAX_GROWTH_MIB} MiB at most",
            f"{len(pieces)} gateways, each before a scheduler of its own",
            f"{wrong[PROCESS]} faults; the most that a process of gateway or scheduler grew is {growth} MiB",
            not wrong[PROCESS] and growth <= MAX_GROWTH_MIB,
        ),
    ]
