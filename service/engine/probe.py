"""Tries a bundle in a process of its own, which may fail, crash, grow or never end: `python -m …probe SETTINGS`.

It loads, warms up and proves the bundle as the service would, within limits that the kernel keeps, and writes one line
of JSON: `{"digest": …}` of the manifest, or `{"refused": "a sentence"}`. `engine.proofs` starts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import resource

LATE_S = 2.0  # after the time limit, should nobody be left to end this process
NICE = 5  # requests go first
PR_SET_PDEATHSIG = 1


def main(given: str) -> None:
    result = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # ONNX Runtime may print
    chosen: dict[str, Any] = json.loads(given)
    try:
        limit_time(chosen["load_timeout_s"])
        answer = {"digest": _try(chosen)}
    except Exception as error:  # whatever a bad bundle can cause is the answer
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        answer = {"refused": f"{kind}{error or 'out of memory'}"[:2000]}
    os.write(result, json.dumps(answer).encode() + b"\n")


def limit_time(timeout_s: float) -> None:
    """Have the kernel end this process after the time limit, or with its parent, or first when memory runs out."""
    if sys.platform == "win32":
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_s + LATE_S)
    seconds = int(timeout_s * (os.cpu_count() or 1) + LATE_S)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(OSError):
        os.nice(NICE)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def limit_memory(max_bytes: int) -> None:
    """What this process may allocate. Not for CUDA, whose driver maps far more than it uses."""
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))


def _try(chosen: dict[str, Any]) -> str:
    import onnxruntime

    from camcal.service.engine.session import CUDA, load_sessions
    from camcal.service.settings import Settings

    settings = Settings(**chosen)
    if settings.device == "cpu" or CUDA not in onnxruntime.get_available_providers():
        limit_memory(settings.load_bytes)
    return load_sessions(settings)[0].bundle.digest


if __name__ == "__main__":
    main(sys.argv[1])
