"""Outages of a real service: a full disk, a closed log, a clock that jumps, a killed worker."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.service.conftest import png
from tests.service.process.test_supervisor import workers
from tests.service.test_live import ROOT, metric, post, process, wait_for

BUNDLE = ROOT / "models/pretrained/cifar10-lt-if100"


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


@contextmanager
def service_on(path: Path, stderr: int, **environment: str) -> Iterator[httpx.Client]:
    """Start a service on a Unix socket that logs to `stderr`, and return its client."""
    command = [sys.executable, "-m", "camcal", "serve", "--bundle", str(BUNDLE), "--uds", str(path)]
    settings = {"CAMCAL_ACCESS_LOG": "true", "CAMCAL_DRAIN_S": "0.1", **environment}
    with subprocess.Popen(command, cwd=ROOT, env=settings, stderr=stderr) as child:
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://camcal") as client:
                wait_for(lambda: child.poll() is not None or listens(path))
                yield client
            child.send_signal(signal.SIGTERM)
            assert child.wait(30) == 0
        finally:
            child.kill()


@pytest.mark.parametrize(("format", "workers"), [("text", "1"), ("json", "2")])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_loses_only_the_log(tmp_path: Path, format: str, workers: str) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with service_on(tmp_path / "s", full, CAMCAL_LOG_FORMAT=format, CAMCAL_WORKERS=workers) as client:
            responses = [
                client.post("/predict", content=png(), headers={"Content-Type": "image/png"}) for _ in range(5)
            ]
            assert {response.status_code for response in responses} == {200}
    finally:
        os.close(full)


@pytest.mark.parametrize("format", ["text", "json"])
def test_closed_log_pipe_loses_only_the_log(tmp_path: Path, format: str) -> None:
    reads, writes = os.pipe()
    threading.Timer(0, os.close, (reads,)).start()
    try:
        with service_on(tmp_path / "s", writes, CAMCAL_LOG_FORMAT=format) as client:
            responses = [
                client.post("/predict", content=png(), headers={"Content-Type": "image/png"}) for _ in range(5)
            ]
            assert {response.status_code for response in responses} == {200}
    finally:
        os.close(writes)


@pytest.mark.parametrize("days", [1, -1])
def test_clock_jump_changes_no_response(tmp_path: Path, days: int) -> None:
    jumped = tmp_path / "jumped"
    program = (
        "-c",
        f"""if True:
        import os, time
        true = time.time
        time.time = lambda: true() + ({days} * 86400 if os.path.exists({str(jumped)!r}) else 0)
        from camcal.__main__ import main
        main()""",
    )
    with process(BUNDLE, program, CAMCAL_TIMEOUT_S="5", CAMCAL_CAM_TTL_S="300") as (_, url):
        before = post(url).json()["cam"]["url"]
        jumped.touch()
        after = post(url)
        assert after.status_code == 200
        for address in (before, after.json()["cam"]["url"]):
            heatmap = httpx.get(url + address)
            assert heatmap.status_code == 200
            life = re.search(r"max-age=(\d+)", heatmap.headers["cache-control"])
            assert life and 0 <= int(life[1]) <= 300
        assert metric(url, "camcal_cam_store_entries") == 2


def test_killed_worker_loses_only_its_own_connections() -> None:
    with process(BUNDLE, CAMCAL_WORKERS="2") as (child, url), ThreadPoolExecutor(4) as clients:
        stop = threading.Event()

        def send_requests(client: int) -> Counter[str]:
            outcomes = Counter[str]()
            for seed in itertools.count(client):
                if stop.is_set():
                    break
                try:
                    outcomes[str(post(url, seed % 20).status_code)] += 1
                except httpx.TransportError:
                    outcomes["lost"] += 1
            return outcomes

        counts = [clients.submit(send_requests, client) for client in range(4)]
        try:
            wait_for(lambda: metric(url, "camcal_predictions_total") > 20)
            first, second = workers(child)
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: len(pids := workers(child)) == 2 and first not in pids and second in pids)
            responding = {post(url).json()["cam"]["url"][5] for _ in range(20)}
            wait_for(lambda: responding | {post(url).json()["cam"]["url"][5]} == {"A", "B"})
        finally:
            stop.set()
        outcomes = sum((count.result() for count in counts), Counter[str]())
        assert outcomes.keys() <= {"200", "lost"} and outcomes["200"] > 20
        assert outcomes["lost"] <= 4  # at most one per client
