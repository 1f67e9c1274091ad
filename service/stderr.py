"""Lines that libraries write to standard error by themselves, such as ONNX Runtime in C++: as JSON, like all others."""

from __future__ import annotations

import atexit
import io
import os
import re
import signal
import sys
import time
from typing import TextIO

import orjson

FLUSH_S = 2.0  # for the last lines, at the end

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ONNXRUNTIME = re.compile(r"\[([VIWEF]):onnxruntime")
_LEVELS = {"V": "debug", "I": "info", "W": "warning", "E": "error", "F": "critical"}


def wrap() -> TextIO:
    """Have a process of its own turn every line on standard error into JSON; returns the stream for what is JSON.

    Not a thread: the last words of a process that is aborted would be lost with it. Call it early, while there is
    little to fork. Where the system cannot fork, nothing changes.
    """
    if not hasattr(os, "fork"):
        return sys.stderr
    sys.stderr.flush()
    raw = os.dup(2)
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        os.close(writes)
        os.dup2(os.open(os.devnull, os.O_RDWR), 2)  # what it writes itself would come back to it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends with the last that writes
            signal.signal(number, signal.SIG_IGN)
        try:
            _copy(reads, raw)
        finally:
            os._exit(0)
    os.close(reads)
    os.dup2(writes, 2)
    os.close(writes)
    atexit.register(_unwrap, os.getpid(), child, raw)
    return io.TextIOWrapper(os.fdopen(raw, "wb", 0, closefd=False), "utf-8", "backslashreplace", write_through=True)


def _copy(reads: int, raw: int) -> None:
    with os.fdopen(reads, "rb") as lines:
        for line in lines:
            if said := as_json(line):
                os.write(raw, said)


def as_json(line: bytes) -> bytes:
    """The record of one line; nothing of an empty one, and the line itself if it is a JSON object already."""
    text = _COLOURS.sub("", line.decode(errors="replace")).rstrip()
    if not text:
        return b""
    try:
        if isinstance(orjson.loads(line), dict):
            return line
    except orjson.JSONDecodeError:
        pass
    found = _ONNXRUNTIME.search(text)
    level = _LEVELS[found[1]] if found else "warning"
    return orjson.dumps({"time": time.time(), "level": level, "logger": "stderr", "message": text}) + b"\n"


def _unwrap(owner: int, child: int, raw: int) -> None:
    """At the end of the process `owner`, wait for the last lines."""
    if os.getpid() != owner:
        return
    sys.stderr.flush()
    os.dup2(raw, 2)
    end = time.monotonic() + FLUSH_S  # another process may write on
    while time.monotonic() < end and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.005)
