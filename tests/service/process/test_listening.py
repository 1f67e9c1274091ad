"""Addresses, ports and Unix sockets, with real sockets and processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from camcal.models.bundle import Bundle
from camcal.service.process.listening import ListenError, Listeners
from camcal.service.settings import Settings
from tests.service.conftest import png
from tests.service.http.routes.test_predict import RAW
from tests.service.test_live import ROOT, process

WORKERS = pytest.mark.parametrize("workers", ["1", "2"])


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path short enough for a Unix socket."""
    return tmp_path_factory.mktemp("uds") / "camcal.sock"


def post(path: Path) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=20) as client:
        return client.post("http://camcal/predict", content=png(), headers=RAW)


@WORKERS
def test_unix_socket(bundle: Bundle, path: Path, workers: str) -> None:
    with process(bundle, CAMCAL_UDS=str(path), CAMCAL_WORKERS=workers, CAMCAL_DRAIN_S="0") as (child, url):
        assert url == f"unix:{path}"
        assert [post(path).status_code for _ in range(2)] == [200, 200]
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o660
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0
    assert not path.exists()


@WORKERS
def test_unix_socket_of_a_killed_service_is_replaced(bundle: Bundle, path: Path, workers: str) -> None:
    for _ in range(2):
        with process(bundle, CAMCAL_UDS=str(path), CAMCAL_WORKERS=workers) as (child, _):
            assert post(path).status_code == 200
            child.kill()
            child.wait(20)
        assert path.exists()


def test_unix_socket_in_use_is_an_error(path: Path) -> None:
    settings = Settings(uds=path)
    with Listeners(settings) as first:
        first.open()
        with pytest.raises(ListenError, match=f"^another process already listens on {path}; choose another with --uds"):
            Listeners(settings)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_two_servers_that_start_with_the_same_unix_socket(path: Path) -> None:
    settings = Settings(uds=path)
    with Listeners(settings) as first, Listeners(settings) as second:
        with pytest.raises(ListenError, match=f"^another process has replaced {path}"):
            first.open()
        first.close()
        second.open()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_unix_socket_is_removed_before_the_last_clients_are_served(path: Path) -> None:
    with Listeners(Settings(uds=path)) as listeners, socket.socket(socket.AF_UNIX) as client:
        listeners.open()
        client.connect(str(path))
        listeners.stop_accepting()
        assert not path.exists()
        with Listeners(Settings(uds=path)) as successor:
            successor.open()
            listeners.close()
            assert path.exists()  # that of the successor


def test_paths_that_cannot_be_sockets(tmp_path: Path, path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ListenError, match="exists and is not a socket; choose another with --uds or CAMCAL_UDS$"):
        Listeners(Settings(uds=path))
    assert path.read_text() == "precious"
    with pytest.raises(ListenError, match="^cannot create the Unix socket .*: No such file or directory"):
        Listeners(Settings(uds=path.parent / "absent" / "x"))
    with pytest.raises(ListenError, match="bytes; the limit for a Unix socket is 107"):
        Listeners(Settings(uds=tmp_path / ("x" * 108)))


@WORKERS
@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_both_families_over_one_port(bundle: Bundle, workers: str) -> None:
    with process(bundle, CAMCAL_HOST="::", CAMCAL_WORKERS=workers) as (_, url):
        port = httpx.URL(url).port
        assert url == f"http://[::]:{port}"
        assert {httpx.get(f"http://{host}:{port}/health/live").status_code for host in ("127.0.0.1", "[::1]")} == {200}


def test_every_address_of_a_name_has_the_same_port() -> None:
    with Listeners(Settings(host="localhost", port=0)) as listeners:
        assert len({listener.getsockname()[1] for listener in listeners.sockets}) == 1


def test_connections_are_refused_before_the_service_is_ready() -> None:
    with Listeners(Settings(port=0)) as listeners:
        address = listeners.sockets[0].getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=10)
        listeners.open()
        socket.create_connection(address, timeout=10).close()


def test_another_server_opens_the_port_first() -> None:
    with Listeners(Settings(port=0)) as first:
        port = first.sockets[0].getsockname()[1]
        with Listeners(Settings(port=port)) as second:
            first.open()
            with pytest.raises(ListenError, match=f"^port {port} on 127.0.0.1 is already in use"):
                second.open()


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("192.0.2.1", "host 192.0.2.1 is not an address of this machine; choose another with --host or CAMCAL_HOST"),
        ("no.such.host.invalid", "unknown host no.such.host.invalid; choose another with --host or CAMCAL_HOST"),
        ("a" * 80, "unknown host"),  # too long for a host name
    ],
)
def test_invalid_hosts(host: str, message: str) -> None:
    with pytest.raises(ListenError, match=re.escape(message)):
        Listeners(Settings(host=host, port=0))


@WORKERS
def test_port_in_use_is_reported_before_the_model_is_loaded(tmp_path: Path, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "camcal", "serve", "--port", str(port), "--workers", workers]
        absent = ["--bundle", str(tmp_path / "absent")]  # would be the error otherwise
        result = subprocess.run([*command, *absent], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    error = f"error: port {port} on 127.0.0.1 is already in use; choose another with --port or CAMCAL_PORT\n"
    assert result.stderr == error


@WORKERS
def test_read_only_file_system(bundle: Bundle, workers: str) -> None:
    """Like `docker run --read-only` without a tmpfs."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs permission to mount")
    program = """if True:
        import os, subprocess, sys
        with open("/proc/mounts") as mounts:
            for mount in mounts:
                subprocess.run(["mount", "-o", "remount,bind,ro", mount.split()[1]], capture_output=True)
        try:
            open(os.path.join(sys.argv.pop(1), "probe"), "w")
        except OSError:
            from camcal.__main__ import app
            app()"""
    folder = str(bundle.path)
    command = ["unshare", "-m", sys.executable, "-c", program, folder, "serve", "--bundle", folder, "--port", "0"]
    environment = {"PATH": os.environ["PATH"], "CAMCAL_WORKERS": workers, "CAMCAL_MAX_BATCH": "2"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stderr is not None
            url = next(match[0] for line in child.stderr if (match := re.search(r"http://[\d.:]+", line)))
            responses = [httpx.post(f"{url}/predict", content=png(), headers=RAW, timeout=20) for _ in range(2)]
            for response in responses:
                assert httpx.get(url + response.json()["cam"]["url"]).status_code == 200
        finally:
            child.kill()
