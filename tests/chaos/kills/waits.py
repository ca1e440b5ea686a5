"""How long after a kill tokens come again."""

import bisect
from collections.abc import Sequence


def next_token_at(kill: float, arrivals: Sequence[float], min_gap_s: float) -> float | None:
    """When the first token came after a kill that was not under way already: the end of the first time without tokens
    that is as long as min_gap_s, which is shorter than any worker takes to start. None where there is none yet.
    arrivals ascend.
    """
    before = kill
    for index in range(bisect.bisect_right(arrivals, kill), len(arrivals)):
        if arrivals[index] - before >= min_gap_s:
            return arrivals[index]
        before = arrivals[index]
    return None


def waits(
    kills: Sequence[float], losses: Sequence[float], arrivals: Sequence[float], min_gap_s: float
) -> tuple[list[float], int]:
    """Seconds from each kill to the next token; and how many are left out, as another of the losses came before that
    token. losses hold the kills too.
    """
    seconds, num_overtaken = [], 0
    for kill in kills:
        end = next_token_at(kill, arrivals, min_gap_s)
        if any(kill < loss and (end is None or loss < end) for loss in losses):
            num_overtaken += 1
        elif end is not None:
            seconds.append(end - kill)
    return seconds, num_overtaken
