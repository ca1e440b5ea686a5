"""What the log says while there is no worker."""

import logging
import time

logger = logging.getLogger(__name__)

MIN_PAUSE_S = 5.0
MAX_PAUSE_S = 300.0
MAX_REASONS = 8


class WaitingLog:
    """A wait has a line when it begins, one for each new reason, and some in between, ever less often."""

    def __init__(self, address: str) -> None:
        """address: the worker's."""
        self._address = address
        self.end()

    def end(self) -> None:
        """The worker is there, or another wait begins."""
        self._since = 0.0
        self._due = 0.0
        self._pause_s = MIN_PAUSE_S
        self._reasons: set[str] = set()

    def say(self, reason: str) -> None:
        """To be called after each try that failed. A reason that comes again is not logged again, nor is any beyond the
        first few of a wait.
        """
        now = time.monotonic()
        if not self._reasons:
            self._since, self._due = now, now + self._pause_s
        if reason not in self._reasons and len(self._reasons) < MAX_REASONS:
            self._reasons.add(reason)
            logger.warning("waiting for the worker at %s: %s", self._address, reason)
        elif now >= self._due:
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            self._due = now + self._pause_s
            logger.info("still waiting for the worker at %s, for %.0f s: %s", self._address, now - self._since, reason)
