"""Test a bundle in a separate process, which may fail, crash, use too much memory or hang: `python -m …probe SETTINGS`.

The process loads, warms up and checks the bundle as the server would, within resource limits enforced by the kernel. It
writes one line of JSON: `{"digest": …}` of the manifest, or `{"refused": "a sentence"}`. `engine.proofs` starts it.
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

LATE_S = 2.0  # after the timeout this process ends by itself, in case its parent is gone
NICE = 5  # requests have priority
PR_SET_PDEATHSIG = 1


def main(settings_json: str) -> None:
    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # ONNX Runtime may print to standard output
    settings: dict[str, Any] = json.loads(settings_json)
    try:
        limit_time(settings["load_timeout_s"])
        result = {"digest": _test(settings)}
    except Exception as error:  # a bad bundle may cause anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        result = {"refused": f"{kind}{error or 'out of memory'}"[:2000]}
    os.write(output, json.dumps(result).encode() + b"\n")


def limit_time(timeout_s: float) -> None:
    """Let the kernel end this process after the timeout, with its parent, or first when the system is out of memory."""
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
    """Limit the memory of this process. Not for CUDA, whose driver maps far more memory than it uses."""
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))


def _test(values: dict[str, Any]) -> str:
    import onnxruntime

    from camcal.service.engine.session import CUDA, load_sessions
    from camcal.service.settings import Settings

    settings = Settings(**values)
    if settings.device == "cpu" or CUDA not in onnxruntime.get_available_providers():
        limit_memory(settings.load_bytes)
    return load_sessions(settings)[0].bundle.digest


if __name__ == "__main__":
    main(sys.argv[1])
