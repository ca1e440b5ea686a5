"""How long after a kill tokens come again."""

import bisect
from collections.abc import Sequence


def next_token_at(kill: float, arrivals: Sequence[float], min_gap_s: float) -> float | None:
    """The time of the first token that was computed after a kill, or None if none has come yet.

    Tokens that were already under way come first, without a long gap. So the first arrival after a gap of min_gap_s or
    more, which is shorter than any worker takes to start, is of a new worker. arrivals ascend.
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
    """The seconds from each kill to the next token, and the number of kills that are left out because another loss came
    before that token. losses: all times at which a worker was lost, the kills included.
    """
    seconds, num_overtaken = [], 0
    for kill in kills:
        end = next_token_at(kill, arrivals, min_gap_s)
        if any(kill < loss and (end is None or loss < end) for loss in losses):
            num_overtaken += 1
        elif end is not None:
            seconds.append(end - kill)
    return seconds, num_overtaken
