"""Structured logs: one JSON object a line on stderr, which Ray keeps with the replica's logs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

LOGGER = "focus_ray.serving"
_LIBRARY = "focus_ray.bundle"  # what it logs of damaged records goes the same way


class JsonLines(logging.Formatter):
    """time, level, event and the facts of the call; a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up(level: int = logging.INFO) -> None:
    """Sends this service's events to stderr, once a process."""
    for name in (LOGGER, _LIBRARY):
        logger = logging.getLogger(name)
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(JsonLines())
            logger.addHandler(handler)
            logger.propagate = False
        logger.setLevel(level)


def log(event: str, *, level: int = logging.INFO, error: BaseException | str | None = None, **facts: Any) -> None:
    """An event with its facts. error: an exception is logged with its traceback."""
    if isinstance(error, BaseException):
        facts["error"] = str(error)
    elif error is not None:
        facts["error"] = error
    exception = error if isinstance(error, BaseException) else None
    logging.getLogger(LOGGER).log(level, event, extra={"facts": facts}, exc_info=exception)
