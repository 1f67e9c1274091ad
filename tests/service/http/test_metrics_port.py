"""/metrics on a port of its own: real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from camcal.models.bundle import Bundle
from tests.service.conftest import KEY
from tests.service.process.test_supervisor import gone, workers
from tests.service.test_live import ROOT, process, wait_for


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def text(port: int) -> str:
    """The metrics; empty while nobody answers."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/metrics").text
    except httpx.TransportError:
        return ""


def test_metrics_are_there_alone_and_without_a_key(bundle: Bundle) -> None:
    port = free_port()
    with process(bundle, CAMCAL_METRICS_PORT=str(port), CAMCAL_API_KEY=KEY) as (_, url):
        assert "camcal_ready 1.0" in text(port)
        for path in ("/", "/model", "/predict", "/health/ready"):
            assert httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 404
        assert httpx.get(f"{url}/metrics").status_code == 404
        assert "server" not in httpx.get(f"http://127.0.0.1:{port}/metrics").headers


def test_all_workers_are_told_of_even_after_the_first_died(bundle: Bundle) -> None:
    port = free_port()
    with process(bundle, CAMCAL_METRICS_PORT=str(port), CAMCAL_WORKERS="2") as (child, _):
        ready = [f'camcal_ready{{worker="{worker}"}} 1.0' for worker in (0, 1)]
        wait_for(lambda: all(line in text(port) for line in ready))
        first = workers(child)[0]
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: gone(first))
        wait_for(lambda: all(line in text(port) for line in ready))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_port_in_use_is_told_at_once(bundle: Bundle, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = os.environ | {"CAMCAL_METRICS_PORT": str(port), "CAMCAL_WORKERS": workers}
        command = [sys.executable, "-m", "camcal", "serve", "--bundle", str(bundle.path), "--port", "0"]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    message = f"error: port {port} on 127.0.0.1 is already in use; choose another with CAMCAL_METRICS_PORT\n"
    assert ended.stderr == message
