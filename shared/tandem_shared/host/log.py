"""Logging to stderr, one line for each event, as text or as JSON. Each line names the service that wrote it, as several
may share a terminal or a file. What a client sent, and a line repeats, neither ends a line nor reaches a terminal as an
escape sequence.
"""

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

FORMATS = ("text", "json")
FIELDS = "fields"
"""The key in a logging call's `extra` under which a JSON line's further fields are given."""


class _TextFormatter(logging.Formatter):
    """A line for each event, and the lines of its traceback if it has one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(_escaped, super().formatException(ei).split("\n")))


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


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
        return json.dumps(line, default=str)


def configure_logging(level: str, form: str = "text", service: str = "tandem") -> None:
    """level: the least severe level that is logged, for example "info". form: one of FORMATS. service: what writes the
    lines, for example "worker".
    """
    handler = logging.StreamHandler()
    if form == "json":
        handler.setFormatter(_JsonFormatter(service))
        # gRPC's core writes lines of its own to stderr, for example for each client without TLS at a server with it. It
        # looks at this when it is imported, or in a child process.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    else:
        name = service.replace("%", "%%")
        handler.setFormatter(_TextFormatter(f"%(asctime)s %(levelname)s {name} %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_tells_no_metadata)


def _tells_no_metadata(record: logging.LogRecord) -> bool:
    """False for what gRPC says of metadata that is not UTF-8: it repeats it all, an API key too, for any caller."""
    return not str(record.msg).startswith("Invalid encoding on")
