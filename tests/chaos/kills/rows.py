"""The rows that kills and poisonous requests add to the table."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tandem.latency import percentiles
from tests.chaos.harness.definitions import Found, Row
from tests.chaos.support.poisoned_worker import FAILS, VANISHES

MAX_LOSSES = {FAILS: 4, VANISHES: 6}
"""The most workers that a poisonous request may take down, by docs/decisions/0002-suspects.md."""
KINDS_BEFORE = ("greedy", "seeded", "two choices", "log-probabilities")
"""The kinds of streams in findings that do not name theirs."""
MAX_STARTS, MARGIN_S = 2.0, 3.0
"""The median time from a kill to the next token may be MAX_STARTS times as long as an undisturbed worker takes to
start, and MARGIN_S longer.
"""


def rows(pieces: Sequence[Found]) -> list[Row]:
    return [*kill_rows(pieces), *poison_rows([piece for piece in pieces if piece["poisons"]])]


def kill_rows(pieces: Sequence[Found]) -> list[Row]:
    kills = _sum(piece["kills"] for piece in pieces)
    num_kills = kills["process"] + kills["supervisor"]
    num_sessions = sum(piece["lost_sessions"] for piece in pieces)
    starts = [each for piece in pieces for each in piece["start_s"]]
    seconds = [each for piece in pieces for each in piece["wait_s"]]
    num_overtaken = sum(piece["overtaken"] for piece in pieces)
    median_start = statistics.median(starts)
    wait = percentiles(seconds, digits=1)
    renderers = f" and {kills['renderer']} of processes that render chats," if kills["renderer"] else ""
    return [
        Row(
            "A killed worker ends no stream, and loses, doubles or changes no token",
            f"{num_kills} kills at random moments, {kills['supervisor']} of them with the supervisor,{renderers} under "
            f"{_streams(pieces)}",
            f"{_outcome(pieces)}; {num_sessions} of the kills ended a session, the others hit a starting worker",
            # More losses than kills would mean that Tandem lost sessions by itself.
            0 < num_sessions <= num_kills and all(_is_undisturbed(piece) for piece in pieces),
        ),
        Row(
            f"Tokens go on when a worker has started: half the times within {MAX_STARTS:g} starts and {MARGIN_S:g} s",
            f"the same kills, but for {num_overtaken} that another loss followed before a token; {len(starts)} starts "
            "of a worker with nothing else to do",
            f"from the kill to the next token p50 {wait.get('p50')} s, p99 {wait.get('p99')} s; a start takes "
            f"{median_start:.1f} s, the longest {max(starts):.1f} s; no stream waited for more than "
            f"{max(piece['longest_gap_s'] for piece in pieces):.1f} s",
            len(seconds) + num_overtaken == num_kills
            and len(seconds) > 0
            and statistics.median(seconds) <= MAX_STARTS * median_start + MARGIN_S,
        ),
    ]


def poison_rows(pieces: Sequence[Found]) -> list[Row]:
    poisons = [each for piece in pieces for each in piece["poisons"]]
    if not poisons:
        return []
    kinds = Counter(each["kind"] for each in poisons)
    codes = Counter(each["code"] for each in poisons)
    losses = [each["losses"] for each in poisons]
    return [
        Row(
            "A request that takes each worker down ends INTERNAL, and no other ends of it",
            f"{len(poisons)} such requests ({kinds[FAILS]} fail in a step, {kinds[VANISHES]} kill the process) among "
            f"{_streams(pieces)}, while workers are killed",
            f"{', '.join(f'{count} ended {code}' for code, count in codes.items())}, each after at most {max(losses)} "
            f"workers; of the others {_outcome(pieces)}",
            all(_is_found_out(each) for each in poisons) and all(_is_undisturbed(piece) for piece in pieces),
        )
    ]


def _is_found_out(poison: Found) -> bool:
    is_accused = poison["code"] == "INTERNAL" and "while it computed this sequence" in poison["details"]
    return is_accused and 0 < poison["losses"] <= MAX_LOSSES[poison["kind"]]


def _is_undisturbed(piece: Found) -> bool:
    """Whether each stream got its whole answer, at least once, and the scheduler has forgotten them all."""
    is_whole = piece["answers"] >= piece["streams"] and not piece["ended"] and not piece["wrong"]
    return is_whole and not piece["faults"] and not any(piece["left"].values())


def _streams(pieces: Sequence[Found]) -> str:
    answers, tokens = (sum(piece[name] for piece in pieces) for name in ("answers", "tokens"))
    kinds = dict.fromkeys(kind for piece in pieces for kind in piece.get("kinds", KINDS_BEFORE))
    return (
        f"{max(piece['streams'] for piece in pieces)} streams ({', '.join(kinds)}; "
        f"float64): {answers:,} answers, {tokens:,} tokens"
    )


def _outcome(pieces: Sequence[Found]) -> str:
    ended = _sum(piece["ended"] for piece in pieces).total()
    wrong = sum(piece["wrong"] for piece in pieces)
    left = _sum(piece["left"] for piece in pieces)
    return f"{ended} ended, {wrong} had lost, doubled or changed tokens, {left.total()} rows or blocks were left behind"


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total
