"""The end of a tensor-parallel group that has lost a rank. Knows no torch."""

import logging
import os
import time
from collections.abc import Callable
from typing import NoReturn

logger = logging.getLogger(__name__)

LAST_WORDS_S = 5.0
"""The longest time that rank 0 takes to tell the scheduler why it ends."""

_tell: Callable[[str], None] | None = None


def tell_failures(tell: Callable[[str], None]) -> None:
    """Sets what rank 0 calls, from any thread, with the reason why it ends."""
    global _tell
    _tell = tell


def fail(problem: str) -> NoReturn:
    """Ends this process at once, as a thread of it may wait in a collective for a rank that will never come."""
    reason = f"the tensor-parallel group is lost: {problem}"
    logger.critical("%s", reason)
    if _tell is not None:
        _tell(reason)
        # Once told, the service ends the process itself, unless its event loop hangs.
        time.sleep(LAST_WORDS_S)
    logging.shutdown()
    os._exit(1)
