"""Lines that libraries write to standard error by themselves, such as ONNX Runtime in C++: as JSON, like all others.

The module is also the program that turns them; it needs nothing but the standard library, so that it is small.
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

FLUSH_S = 2.0  # for the last lines, at the end

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ONNXRUNTIME = re.compile(r"\[([VIWEF]):onnxruntime")
_LEVELS = {"V": "debug", "I": "info", "W": "warning", "E": "error", "F": "critical"}


def wrap() -> TextIO:
    """Have a process of its own turn every line on standard error into JSON; returns the stream for what is JSON.

    Not a thread: the last words of a process that is aborted would be lost with it. On Windows nothing changes.
    """
    if os.name == "nt":
        return sys.stderr
    from subprocess import DEVNULL, Popen

    sys.stderr.flush()
    raw = os.dup(2)
    reads, writes = os.pipe()
    # Of another session, or a terminal would send it the signals that end the service.
    command = [sys.executable, "-I", "-S", __file__]
    child = Popen(command, stdin=reads, stdout=raw, stderr=DEVNULL, start_new_session=True)
    os.close(reads)
    os.dup2(writes, 2)
    os.close(writes)
    atexit.register(_unwrap, os.getpid(), child, raw)
    return io.TextIOWrapper(os.fdopen(raw, "wb", 0, closefd=False), "utf-8", "backslashreplace", write_through=True)


def as_json(line: bytes) -> bytes:
    """The record of one line; nothing of an empty one, and the line itself if it is a JSON object already."""
    text = _COLOURS.sub("", line.decode(errors="replace")).rstrip()
    if not text:
        return b""
    try:
        if text.startswith("{") and isinstance(json.loads(text), dict):
            return line
    except ValueError:
        pass
    found = _ONNXRUNTIME.search(text)
    level = _LEVELS[found[1]] if found else "warning"
    return json.dumps({"time": time.time(), "level": level, "logger": "stderr", "message": text}).encode() + b"\n"


def _copy(lines: BinaryIO, raw: int) -> None:
    for line in lines:
        if record := as_json(line):
            os.write(raw, record)


def _unwrap(owner: int, child: Popen[bytes], raw: int) -> None:
    """At the end of the process `owner`, wait for the last lines."""
    if os.getpid() != owner:
        return
    from subprocess import TimeoutExpired

    sys.stderr.flush()
    os.dup2(raw, 2)
    try:
        child.wait(FLUSH_S)
    except TimeoutExpired:  # another process may write on
        pass


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends with the last process that writes
        signal.signal(number, signal.SIG_IGN)
    _copy(sys.stdin.buffer, 1)
