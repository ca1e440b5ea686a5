"""How long choices wait from one token to the next, for all choices of a step at once.

In most steps the same choices get a token as in the step before. Then all gaps of the step are equal, which one
comparison finds, so that nothing is done for each token. Knows handles and times, nothing of requests.
"""

from collections.abc import Collection, Container, Sequence

from tandem_shared.metrics.histogram import Histogram


class TokenTimes:
    """The time of each choice's newest token, until the choice is forgotten."""

    def __init__(self) -> None:
        # The choices of the newest batch. The same in the order in which they came, if each had one token.
        self._newest: set[int] = set()
        self._newest_at = 0.0
        self._in_order: Sequence[int] | None = None
        # The others.
        self._older: dict[int, float] = {}

    def note(self, handles: Sequence[int], now: float, live: Container[int], gaps: Histogram) -> Collection[int]:
        """A batch of tokens has come, with the handle of its choice for each. Counts the gaps before them, in seconds,
        and returns the choices whose first token it is. Choices that are not live don't count. Tokens of a choice that
        come together have a gap of 0 between them.
        """
        if handles == self._in_order:
            gaps.observe(now - self._newest_at, len(handles))
            self._newest_at = now
            return ()
        came = set(handles)
        again = came & self._newest
        first = []
        for handle in came - again:
            if (then := self._older.pop(handle, None)) is not None:
                gaps.observe(now - then)
            elif handle in live:
                first.append(handle)
            else:
                came.remove(handle)
        gaps.observe(now - self._newest_at, len(again))
        if len(came) < len(handles):
            gaps.observe(0.0, sum(handle in came for handle in handles) - len(came))
        if len(again) < len(self._newest):
            self._older |= dict.fromkeys(self._newest - again, self._newest_at)
        self._newest, self._newest_at = came, now
        self._in_order = handles if len(came) == len(handles) else None
        return first

    def forget(self, handle: int) -> None:
        """The choice has ended, or nobody wants more of it. Tokens of it that still come don't count."""
        if handle in self._newest:
            self._newest.remove(handle)
            self._in_order = None
        else:
            self._older.pop(handle, None)
