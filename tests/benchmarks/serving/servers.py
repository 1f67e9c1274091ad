"""The servers under test: how each is installed, started, found ready, weighed and stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.serving.load import Form, body_of

ROOT = Path(__file__).resolve().parents[3]
REQUIREMENTS = Path(__file__).parent / "requirements"
APPS = "tests.benchmarks.serving.apps"
MARK = "SERVING_BENCHMARK_RUN"  # in the environment of every process of a server, wherever it is in the process tree
START_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0

Command = Callable[[Path, Path, int], list[str]]


class ServerError(RuntimeError):
    """A server that cannot be installed, does not start or does not answer."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """One of the servers: `command` makes its command line from its environment's `bin` folder, a bundle and a port."""

    name: str
    command: Command
    form: Form = "raw"
    field: str = "image"
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def _camcal(bin_: Path, bundle: Path, port: int) -> list[str]:
    workers = str(len(os.sched_getaffinity(0)))
    return [*_camcal_1(bin_, bundle, port), "--workers", workers]


def _camcal_1(bin_: Path, bundle: Path, port: int) -> list[str]:
    return [str(bin_ / "python"), "-m", "camcal", "serve", "--bundle", str(bundle), "--port", str(port)]


def _fastapi(bin_: Path, _: Path, port: int) -> list[str]:
    workers = str(len(os.sched_getaffinity(0)))
    options = ["--port", str(port), "--workers", workers, "--log-level", "warning", "--no-access-log"]
    return [str(bin_ / "python"), "-m", "uvicorn", f"{APPS}.fastapi_app:app", *options]


def _litserve(bin_: Path, _: Path, port: int) -> list[str]:
    return [str(bin_ / "python"), "-m", f"{APPS}.litserve_app", str(port)]


def _bentoml(bin_: Path, _: Path, port: int) -> list[str]:
    options = ["--host", "127.0.0.1", "--port", str(port)]
    return [str(bin_ / "bentoml"), "serve", f"{APPS}.bentoml_app:Classifier", *options]


def _ray(bin_: Path, _: Path, port: int) -> list[str]:
    return [str(bin_ / "python"), "-m", f"{APPS}.ray_app", str(port)]


CAMCAL = Server(name="camcal", command=_camcal)
OURS = (CAMCAL.name, "camcal-1")
SERVERS = {
    server.name: server
    for server in (
        CAMCAL,
        Server(name="camcal-1", command=_camcal_1),
        Server(name="fastapi", command=_fastapi),
        Server(name="litserve", command=_litserve),
        Server(
            name="bentoml",
            command=_bentoml,
            form="multipart",
            field="images",
            environment={"BENTOML_DO_NOT_TRACK": "True"},
        ),
        Server(
            name="ray",
            command=_ray,
            environment={
                "RAY_SERVE_ENABLE_HA_PROXY": "1",
                "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_AUTH_MODE": "disabled",
            },
        ),
    )
}


def install(name: str, folder: Path) -> Path:
    """The `bin` folder of a virtual environment with what `requirements/NAME.txt` pins; made once.

    Raises:
        ServerError: with the installer's last words.
    """
    pins = REQUIREMENTS / f"{name}.txt"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()
    environment, done = folder / name, folder / name / "installed"
    if not done.is_file() or done.read_text() != digest:
        _call([sys.executable, "-m", "venv", "--clear", str(environment)])
        pip = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _call([*pip, "--require-hashes", "-r", str(pins)])
        done.write_text(digest)
    return environment / "bin"


def _call(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        words = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise ServerError(f"{' '.join(command[1:4])} failed: {words[-1][:300]}")


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that answers. ready_s: from the start of its process to its first prediction."""

    server: Server
    port: int
    ready_s: float
    mark: str

    def memory_mb(self) -> float:
        """Resident memory of all its processes in MB; what several share is counted once (PSS)."""
        return sum(_pss_kib(pid) for pid in processes(self.mark)) * 1024 / 1e6


@contextlib.contextmanager
def running(server: Server, bin_: Path, bundle: Path, photo: bytes, log: Path) -> Iterator[Running]:
    """Start a server on a free port, wait for its first prediction, and end all its processes afterwards.

    Raises:
        ServerError: if it ends or gives no prediction in `START_LIMIT_S`.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mark = f"{server.name}-{os.getpid()}-{port}"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {
        **server.environment,
        MARK: mark,
        "BENCH_BUNDLE": str(bundle),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
        "PATH": f"{bin_}:{os.environ['PATH']}",
    }
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            server.command(bin_, bundle, port), env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _wait(process, server, port, photo, log)
        yield Running(server=server, port=port, ready_s=time.perf_counter() - began, mark=mark)
    finally:
        _stop(process, mark)


def _wait(process: subprocess.Popen[bytes], server: Server, port: int, photo: bytes, log: Path) -> None:
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, OSError):
            ask(server, port, photo)
            return
        time.sleep(0.02)
    words = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    raise ServerError(f"{server.name} gave no prediction in {START_LIMIT_S:.0f} s: {words[-1][:300]}")


def ask(server: Server, port: int, photo: bytes) -> list[dict[str, Any]]:
    """The predictions for one JPEG file, most probable first.

    Raises:
        OSError: if there is no answer, or one that is not 200.
    """
    kind, body = body_of(server.form, server.field, photo)
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=30) as answer:
        value = json.load(answer)
    predictions: list[dict[str, Any]] = (value[0] if isinstance(value, list) else value)["predictions"]
    return predictions


def processes(mark: str) -> list[int]:
    """Every process of a server: those with its mark in their environment, and their descendants."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
    grew = True
    while grew:
        children = {pid for pid, parent in parents.items() if parent in found}
        grew = not children <= found
        found |= children
    return sorted(found)


def _pss_kib(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def _stop(process: subprocess.Popen[bytes], mark: str) -> None:
    """SIGTERM, time to drain, and SIGKILL for what is left."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_LIMIT_S)
    end = time.monotonic() + 2
    while (left := processes(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(STOP_LIMIT_S)
