"""Logging to stderr, one line for each event."""

import logging


def configure_logging(level: str) -> None:
    """level: the least severe level that is logged, for example "info"."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
