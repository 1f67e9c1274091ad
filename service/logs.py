"""Logging to standard error: text, or one JSON object per line. Logs never contain image data."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import time
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import orjson

from camcal.printable import printable
from camcal.service import stderr

if TYPE_CHECKING:
    from camcal.service.settings import LogFormat

log = logging.getLogger("camcal")

MODEL = "camcal.model"  # key in a request's scope: the model version that answers the request

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the current request


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, request id, and the traceback of an exception.

    The `fields` of a record, if any, replace its message.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": record.created, "level": record.levelname.lower(), "logger": record.name}
        line |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if (id := request_id.get()) is not None:
            line["request_id"] = id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            text = orjson.dumps(line, default=str).decode()
        except TypeError:  # a lone surrogate, as in a file name that is not UTF-8
            text = json.dumps(line, default=str)
        return printable(text)


class TextFormatter(logging.Formatter):
    """The message and the traceback. All lines after the first are indented, so that none can be taken for a record."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        return "\n  ".join(map(printable, text.split("\n")))


_stream: TextIO | None = None  # the original standard error, after `only_json` has redirected file descriptor 2


def configure(format: LogFormat) -> None:
    """Write all records to standard error in `format`."""
    handler = logging.StreamHandler(_stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


def only_json() -> None:
    """Make every line that this process and its forks write to standard error a JSON object."""
    global _stream
    _stream = stderr.wrap()
    configure("json")
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: log.error("%s: %r", args.err_msg or "ignored", args.exc_value)


def drop_unwritten() -> None:
    """Discard log lines that cannot be written at exit. Python would exit with code 120, for example on a full disk."""
    try:
        sys.stderr.flush()
    except OSError:
        sys.stderr = io.StringIO()


def in_json() -> bool:
    """Whether `only_json` was called."""
    return _stream is not None


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    log.critical("uncaught %s: %s", kind.__name__, error, exc_info=(kind, error or kind(), trace))


class RateLimitedWarning:
    """Logs a repeated warning at most once per `period_s`."""

    def __init__(self, log: logging.Logger, period_s: float = 5.0):
        self._log = log
        self._period_s = period_s
        self._next = 0.0

    def __call__(self, message: str, *arguments: object) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._period_s
            self._log.warning(message, *arguments)
