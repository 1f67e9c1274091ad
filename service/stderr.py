"""Convert to JSON what libraries write to standard error directly, such as ONNX Runtime from C++.

This module is also the program of the converting process. It imports only the standard library, to stay small.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import re
import signal
import sys
import time
from typing import TYPE_CHECKING, BinaryIO, TextIO

if TYPE_CHECKING:
    from subprocess import Popen

FLUSH_S = 2.0  # longest wait for the last lines at exit

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ONNXRUNTIME = re.compile(r"\[([VIWEF]):onnxruntime")
_LEVELS = {"V": "debug", "I": "info", "W": "warning", "E": "error", "F": "critical"}


def wrap() -> TextIO:
    """Let a child process convert every line on standard error to JSON. Returns the stream for lines that are JSON.

    This is a process and not a thread, so that the last lines of an aborted process are not lost. On Windows, standard
    error stays as it is.
    """
    if os.name == "nt":
        return sys.stderr
    from subprocess import DEVNULL, Popen

    sys.stderr.flush()
    raw = os.dup(2)
    reads, writes = os.pipe()
    # In a new session, or a terminal would send it the signals that stop the service.
    command = [sys.executable, "-I", "-S", __file__]
    child = Popen(command, stdin=reads, stdout=raw, stderr=DEVNULL, start_new_session=True)
    os.close(reads)
    os.dup2(writes, 2)
    os.close(writes)
    atexit.register(_unwrap, os.getpid(), child, raw)
    return io.TextIOWrapper(os.fdopen(raw, "wb", 0, closefd=False), "utf-8", "backslashreplace", write_through=True)


def as_json(line: bytes) -> bytes:
    """The JSON record of one line. JSON objects are returned unchanged; an empty line gives no record."""
    text = _COLOURS.sub("", line.decode(errors="replace")).rstrip()
    if not text:
        return b""
    try:
        if text.startswith("{") and isinstance(json.loads(text), dict):
            return line
    except ValueError:
        pass
    match = _ONNXRUNTIME.search(text)
    level = _LEVELS[match[1]] if match else "warning"
    return json.dumps({"time": time.time(), "level": level, "logger": "stderr", "message": text}).encode() + b"\n"


def _copy(lines: BinaryIO, raw: int) -> None:
    for line in lines:
        if record := as_json(line):
            os.write(raw, record)


def _unwrap(owner: int, child: Popen[bytes], raw: int) -> None:
    """At exit of the process `owner`, wait for the last lines."""
    if os.getpid() != owner:
        return
    from subprocess import TimeoutExpired

    sys.stderr.flush()
    os.dup2(raw, 2)
    try:
        child.wait(FLUSH_S)
    except TimeoutExpired:  # another process may still write
        pass


if __name__ == "__main__":
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # ends at end of file, when no process writes any more
        signal.signal(number, signal.SIG_IGN)
    _copy(sys.stdin.buffer, 1)
