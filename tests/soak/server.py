"""A real server as a process, and its memory, threads, file descriptors and CPU time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_S = 120.0  # for the first answer
END_S = 90.0  # for the last one, after SIGTERM


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What all processes of a server take together."""

    pss_mb: float  # memory, where a page that n processes share counts as 1/n in each
    threads: int
    descriptors: int
    processes: int


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server. `log` is the file with its standard error."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.url.rpartition(":")[2])

    def family(self) -> list[int]:
        """The ids of its processes, the first one first."""
        return [self.process.pid, *_descendants(self.process.pid)]

    def children(self) -> dict[int, str]:
        """Process id → command line of every process but the first."""
        return {pid: command for pid in _descendants(self.process.pid) if (command := _command(pid))}

    def usage(self) -> Usage:
        """Processes that end while they are looked at count as far as they were seen."""
        pids = self.family()
        pss = sum(_number(f"/proc/{pid}/smaps_rollup", r"^Pss:\s+(\d+) kB") for pid in pids)
        threads = sum(_number(f"/proc/{pid}/status", r"^Threads:\s+(\d+)") for pid in pids)
        descriptors = sum(_entries(f"/proc/{pid}/fd") for pid in pids)
        return Usage(pss_mb=pss / 1024, threads=threads, descriptors=descriptors, processes=len(pids))

    def cpu_s(self) -> float:
        """Seconds of CPU time of all processes, with those that ended and were waited for."""
        return sum(_cpu_s(pid) for pid in self.family())

    def start_peak(self) -> float:
        """Forget the peak of memory so far; the resident MB of all processes now."""
        for pid in self.family():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")
        return sum(_number(f"/proc/{pid}/status", r"^VmRSS:\s+(\d+) kB") for pid in self.family()) / 1024

    def peak_mb(self) -> float:
        """The sum of the processes' peaks of resident memory since `start_peak`."""
        return sum(_number(f"/proc/{pid}/status", r"^VmHWM:\s+(\d+) kB") for pid in self.family()) / 1024

    def stop(self) -> int | None:
        """End it by SIGTERM; the exit code, or None if it had to be killed."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(END_S)
        return None


@contextmanager
def serving(bundle: Path, log: Path, checkout: Path = ROOT, /, **environment: str) -> Iterator[Server]:
    """Run `camcal serve` of a checkout on a free port. At the end, all of its processes are killed."""
    command = [sys.executable, "-m", "camcal", "serve", "--bundle", str(bundle), "--port", "0"]
    path = os.pathsep.join(filter(None, (str(checkout / "src"), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=checkout, env=variables, stderr=file)
    server = None
    try:
        server = Server(process=process, url=_address(process, log), log=log)
        yield server
    finally:
        left = server.family() if server else [process.pid]
        for pid in left if process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if found := re.search(r"http://[\d.:]+", log.read_text(errors="replace")):
            return found[0]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


def _descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def _cpu_s(pid: int) -> float:
    with contextlib.suppress(OSError):
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _number(path: str, pattern: str) -> int:
    with contextlib.suppress(OSError):
        if found := re.search(pattern, Path(path).read_text(), flags=re.MULTILINE):
            return int(found[1])
    return 0


def _entries(path: str) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(path))
    return 0
