"""Turns what the tokenizers library raises into an error of the one request that it happened to."""

import logging

from tandem_shared.errors import TextFailed
from tandem_shared.rust_panic import is_rust_panic

MAX_CHARACTERS = 200

logger = logging.getLogger(__name__)


def text_failure(what: str, error: BaseException) -> TextFailed:
    """The error to end a request with. Raises `error` itself where it asks the process or the task to end.

    The library's panics derive from BaseException alone, so whoever calls it has to catch that.
    """
    if not isinstance(error, Exception) and not is_rust_panic(error):
        raise error
    if isinstance(error, TextFailed):
        return error
    logger.error("%s", what, exc_info=error)
    return TextFailed(f"{what}: {str(error)[:MAX_CHARACTERS]}")
