"""Structured logs: one JSON object per line on stderr, which Ray stores with the logs of the replica."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

LOGGER = "focus_ray.serving"
_LIBRARY = "focus_ray.bundle"  # its warnings about damaged registry records go to the same log


class JsonLogFormatter(logging.Formatter):
    """Formats a log record as JSON: time, level, event, the keyword arguments of `log_event`, and a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as one line of JSON."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging() -> None:
    """Sends the log events of the service to stderr as JSON lines; a second call in a process changes nothing."""
    for name in (LOGGER, _LIBRARY):
        logger = logging.getLogger(name)
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(JsonLogFormatter())
            logger.addHandler(handler)
            logger.propagate = False
        logger.setLevel(logging.INFO)


def log_event(event: str, *, level: int = logging.INFO, error: BaseException | str | None = None, **facts: Any) -> None:
    """Logs an event as a JSON line. An exception as `error` is logged with its traceback.

    Args:
        error: the reason; it becomes the field `error`.
        facts: further fields of the JSON line.
    """
    if isinstance(error, BaseException):
        facts["error"] = str(error)
    elif error is not None:
        facts["error"] = error
    exception = error if isinstance(error, BaseException) else None
    logging.getLogger(LOGGER).log(level, event, extra={"facts": facts}, exc_info=exception)
