"""Logging to stderr, one line for each event, as text or as JSON. Each line names the service that wrote it, as several
may share a terminal or a file.
"""

import json
import logging
from datetime import UTC, datetime
from typing import Any

FORMATS = ("text", "json")
FIELDS = "fields"
"""The key in a logging call's `extra` under which a JSON line's further fields are given."""


class _JsonFormatter(logging.Formatter):
    """An object for each line: time (UTC), level, service, logger, message, and what a logging call gives beside it."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(level: str, form: str = "text", service: str = "tandem") -> None:
    """level: the least severe level that is logged, for example "info". form: one of FORMATS. service: what writes the
    lines, for example "worker".
    """
    handler = logging.StreamHandler()
    if form == "json":
        handler.setFormatter(_JsonFormatter(service))
    else:
        name = service.replace("%", "%%")
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name} %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
