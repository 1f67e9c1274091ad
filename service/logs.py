"""What the service says on standard error: lines for people, or one JSON object a line. Never image data."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import Any

import orjson

from service.settings import LogFormat

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the request being answered


class JsonFormatter(logging.Formatter):
    """One object a record: time, level, logger, message, the request's id, the trace of an exception.

    A record with `fields` has these in place of a message.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": record.created, "level": record.levelname.lower(), "logger": record.name}
        line |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if (id := request_id.get()) is not None:
            line["request_id"] = id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure(format: LogFormat) -> None:
    """Send every record to standard error in `format`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else logging.Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
