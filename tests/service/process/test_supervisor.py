"""Several workers behind one port, with real processes and signals."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from camcal.cpus import pin_to_share, usable_cpus
from camcal.models.bundle import Bundle
from tests.service.conftest import png
from tests.service.test_live import MAIN, ROOT, metric, post, process, wait_for
from tests.service.test_reload import check_map
from tests.service.test_reload import other as other  # a fixture

Service = tuple[subprocess.Popen[str], str]


@pytest.fixture
def service(bundle: Bundle) -> Iterator[Service]:
    with process(bundle, CAMCAL_WORKERS="2", CAMCAL_DRAIN_S="1") as started:
        yield started


def workers(child: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
        return True


def test_connections_take_turns_and_any_worker_draws_any_map(service: Service) -> None:
    _, url = service
    bodies = [post(url, seed).json() for seed in range(6)]  # each over a new connection
    owners = [body["cam"]["url"][len("/cam/")] for body in bodies]
    assert sorted(set(owners)) == ["A", "B"]
    assert owners[::2] == owners[:1] * 3
    for body in bodies:
        for _ in range(2):
            with httpx.Client(base_url=url) as client:
                check_map(client, body)
    unknown = bodies[0]["cam"]["url"][:-6] + "AAAAAA"
    assert {httpx.get(url + unknown).status_code for _ in range(2)} == {404}
    assert httpx.get(f"{url}/cam/{'_' * 22}").status_code == 404  # no such worker
    assert metric(url, 'camcal_requests_total{code="200",route="/predict"') == 6
    assert metric(url, "camcal_cam_store_entries") == 6
    for worker in (0, 1):
        assert metric(url, f'camcal_ready{{worker="{worker}"}}') == 1
        assert metric(url, f'camcal_workers{{worker="{worker}"}}') == 2


def test_any_worker_removes_any_map(service: Service) -> None:
    _, url = service
    for path in [post(url, seed).json()["cam"]["url"] for seed in range(4)]:  # maps of both workers
        assert httpx.delete(url + path).status_code == 204
        assert {httpx.get(url + path).status_code for _ in range(2)} == {404}
        assert {httpx.delete(url + path).status_code for _ in range(2)} == {404}
    assert metric(url, "camcal_cam_store_entries") == 0
    assert httpx.delete(f"{url}/cam/{'_' * 22}").status_code == 404  # no such worker


def test_every_worker_returns_the_same_metrics(service: Service) -> None:
    _, url = service
    assert {post(url).status_code for _ in range(3)} == {200}

    def counted() -> list[str]:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sorted(line for line in lines if line.startswith(("camcal_predictions_total", "camcal_batch_size")))

    assert counted() == counted()


def test_killed_worker_is_restarted(service: Service) -> None:
    child, url = service
    before = workers(child)
    os.kill(before[0], signal.SIGKILL)
    wait_for(lambda: gone(before[0]))
    assert [post(url, seed).status_code for seed in range(3)] == [200] * 3
    wait_for(lambda: len(workers(child)) == 2)
    wait_for(lambda: {post(url).json()["cam"]["url"][5] for _ in range(2)} == {"A", "B"})


def test_all_killed_workers_are_restarted(service: Service) -> None:
    child, url = service
    before = workers(child)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all(map(gone, before)))
    assert httpx.post(f"{url}/predict", content=png(), headers={"Content-Type": "image/png"}, timeout=20).is_success


def test_hung_worker_is_restarted_without_delaying_others(bundle: Bundle) -> None:
    program = "-c", f"{MAIN}; from camcal.service.process import channel; channel.BEAT_S = 0.5; main()"
    with process(bundle, program, CAMCAL_WORKERS="2") as (child, url):
        awake, hung = workers(child)
        os.kill(hung, signal.SIGSTOP)
        texts = []
        for _ in range(2):  # one per worker
            with contextlib.suppress(httpx.ReadError):  # the connection ends with the worker
                texts.append(httpx.get(f"{url}/metrics", timeout=20).text)
        (text,) = texts
        assert 'camcal_ready{worker="0"} 1.0' in text and 'worker="1"' not in text
        wait_for(lambda: gone(hung))
        wait_for(lambda: metric(url, 'camcal_ready{worker="1"}') == 1)
        assert workers(child)[0] == awake


@pytest.mark.parametrize("stuck", [False, True])
def test_worker_with_a_broken_model_is_restarted(bundle: Bundle, tmp_path: Path, stuck: bool) -> None:
    flag, block = tmp_path / "broken", tmp_path / "stuck"
    if stuck:
        block.touch()
    program = (
        "-c",
        f"""if True:
        import os
        from camcal.__main__ import main
        from camcal.service.process import channel, supervisor, worker
        from camcal.service.engine import session
        stop = worker.Worker.stop
        if {stuck}:
            worker.Worker.stop = lambda self: None if os.path.exists({str(block)!r}) else stop(self)
            supervisor.LATE_S = -4
        channel.BEAT_S, run = 0.5, session.Session.run
        def fail(self, *args):
            if os.path.exists({str(flag)!r}) and str(os.getpid()) in open({str(flag)!r}).read().split():
                raise ArithmeticError("the device is gone")
            return run(self, *args)
        session.Session.run = fail
        main()""",
    )
    settings = {"CAMCAL_WORKERS": "2", "CAMCAL_TIMEOUT_S": "5", "CAMCAL_BODY_TIMEOUT_S": "0.5"}
    with process(bundle, program, **settings) as (child, url):
        before = workers(child)
        flag.write_text(" ".join(map(str, before)))  # their replacements work
        for _ in range(5):
            assert [post(url, seed).status_code for seed in range(2)] == [500, 500]  # one per worker
        wait_for(lambda: all(map(gone, before)))
        assert [post(url, seed).status_code for seed in range(2)] == [200, 200]
        wait_for(lambda: len(workers(child)) == 2)
        block.unlink(missing_ok=True)  # or the workers would outlive their supervisor and this test


@contextlib.contextmanager
def burst(service: Service) -> Iterator[list[socket.socket]]:
    """Open more connections, with requests, than the suspended workers have room for."""
    child, url = service
    address = httpx.URL(url).host, httpx.URL(url).port
    with contextlib.ExitStack() as stack:
        for pid in workers(child):
            os.kill(pid, signal.SIGSTOP)
        clients = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(700)]
        for client in clients:
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: camcal\r\n\r\n")
        yield clients


def wait_for_turns(child: subprocess.Popen[str], count: int) -> None:
    """Wait until the supervisor, which checks every 10 ms for a free worker, has checked `count` more times."""

    def turns() -> int:
        match = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", Path(f"/proc/{child.pid}/status").read_text(), re.M)
        assert match
        return int(match[1])

    before = turns()
    wait_for(lambda: turns() >= before + count)


def resume(child: subprocess.Popen[str]) -> None:
    for pid in workers(child):
        os.kill(pid, signal.SIGCONT)


def test_burst_of_connections_waits_for_room(service: Service) -> None:
    child, url = service
    with burst(service) as clients:
        child.send_signal(signal.SIGHUP)  # a command that queues up behind all connections in the channels
        wait_for_turns(child, 5)
        resume(child)
        assert {client.recv(12) for client in clients} == {b"HTTP/1.1 200"}
    wait_for(lambda: metric(url, 'camcal_reloads_total{result="done"') == 2)


def test_burst_of_connections_is_served_before_shutdown(service: Service) -> None:
    child, _ = service
    with burst(service) as clients:
        child.send_signal(signal.SIGINT)
        wait_for_turns(child, 40)  # longer than it waits for the last connections
        resume(child)
        assert {client.recv(12) for client in clients} == {b"HTTP/1.1 200"}
    assert child.wait(30) == 0


def test_restarted_worker_with_another_bundle_makes_all_reload(
    bundle: Bundle, other: Bundle, current: Callable[[Path], Path]
) -> None:
    with process(current(bundle.path), CAMCAL_WORKERS="2") as (child, url):
        current(other.path)
        killed = workers(child)[0]
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: killed not in workers(child))  # until then it may get a connection, which is lost
        wait_for(lambda: {post(url).json()["cam"]["url"][5] for _ in range(2)} == {"A", "B"})
        wait_for(lambda: {post(url).json()["model"]["version"] for _ in range(2)} == {other.manifest.version})


def test_service_exits_if_no_worker_can_restart(bundle: Bundle, current: Callable[[Path], Path]) -> None:
    program = (
        "-c",
        f"{MAIN}; from camcal.service.process import supervisor; supervisor.RESTART_S = 0.02; main()",
    )
    with process(current(bundle.path), program, CAMCAL_WORKERS="2") as (child, _):
        current(bundle.path / "absent")
        for pid in workers(child):
            os.kill(pid, signal.SIGKILL)
        assert child.wait(20) == 2
        assert child.stderr is not None
        log = child.stderr.read()
        assert log.count("restarting it") == 6 and "error: no bundle" in log


def test_workers_end_with_their_supervisor_and_leave_no_files(bundle: Bundle) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's folders have names too long for a socket
        with process(bundle, CAMCAL_WORKERS="2", TMPDIR=name) as (child, url):
            pids = workers(child)
            assert post(url).status_code == 200
            assert list(Path(name).iterdir()) == []
            child.kill()
            wait_for(lambda: all(map(gone, pids)))
        assert list(Path(name).iterdir()) == []


def test_signal_to_the_process_group_counts_once(bundle: Bundle) -> None:
    """A terminal sends signals to all processes of the group."""
    command = [sys.executable, "-m", "camcal", "serve", "--bundle", str(bundle.path), "--port", "0", "--workers", "2"]
    environment = {"CAMCAL_DRAIN_S": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            assert child.stderr is not None
            matches = (re.search(r"http://[\d.:]+", line) for line in iter(child.stderr.readline, ""))
            url = next(match[0] for match in matches if match)
            os.killpg(child.pid, signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
            assert post(url).status_code == 200
            assert child.wait(30) == 0
        finally:
            child.kill()


def test_second_signal_exits_at_once(bundle: Bundle) -> None:
    with process(bundle, CAMCAL_WORKERS="2", CAMCAL_DRAIN_S="60") as (child, url):
        pids = workers(child)
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
        child.send_signal(signal.SIGTERM)
        child.wait(30)
        assert all(map(gone, pids))


def test_reload_reaches_every_worker(bundle: Bundle, other: Bundle, current: Callable[[Path], Path]) -> None:
    with process(current(bundle.path), CAMCAL_WORKERS="2") as (child, url):
        current(other.path)
        child.send_signal(signal.SIGHUP)
        wait_for(lambda: metric(url, 'camcal_reloads_total{result="done"') == 2)
        versions = {post(url).json()["model"]["version"] for _ in range(2)}
        assert versions == {other.manifest.version}


def start(*arguments: str) -> Any:
    command = [sys.executable, "-m", "camcal", "serve", "--workers", "2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_workers_that_cannot_start(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "bad")
    (tmp_path / "bad" / "model.onnx").write_bytes(b"no graph")
    result = start("--bundle", str(tmp_path / "bad"), "--port", "0")
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    assert "model.onnx" in result.stderr


def test_one_worker_that_cannot_start(bundle: Bundle, tmp_path: Path) -> None:
    """The other worker is ready first, and the service does not listen yet."""
    program = f"""
import os
import time
from camcal.__main__ import main
from camcal.service.process import supervisor

work, on_serving = supervisor.run_worker, supervisor.Supervisor._on_serving


def start(settings, siblings, *rest):
    if siblings.index:
        while not os.path.exists({str(tmp_path / "ready")!r}):
            time.sleep(0.01)
        raise SystemExit(3)
    work(settings, siblings, *rest)


def on_ready(self, worker, version):
    on_serving(self, worker, version)
    open({str(tmp_path / "ready")!r}, "w").close()


supervisor.run_worker, supervisor.Supervisor._on_serving = start, on_ready
main()
"""
    command = [sys.executable, "-c", program, "serve", "--workers", "2", "--bundle", str(bundle.path), "--port", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: worker 1 exited with code 3"
    assert "listen" not in result.stderr


def test_address_in_use(bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = start("--bundle", str(bundle.path), "--port", str(port))
    assert result.returncode == 2
    error = f"error: port {port} on 127.0.0.1 is already in use; choose another with --port or CAMCAL_PORT"
    assert result.stderr.splitlines() == [error]


def test_shares_of_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus: dict[int, set[int]] = {0: set(range(8, 13))}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus[pid])
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, mask: cpus.update({pid: set(mask)}))
    monkeypatch.setattr("camcal.cpus._quotas", lambda root: iter([]))
    assert (pin_to_share(1, 2), cpus[0]) == (3, {10, 11, 12})
    assert (pin_to_share(0, 4), cpus[0]) == (1, {10, 11, 12})  # more parts than CPUs
    monkeypatch.setattr("camcal.cpus._quotas", lambda root: iter([2.0]))
    assert usable_cpus() == 2
    assert (pin_to_share(1, 2), cpus[0]) == (1, {10, 11, 12})  # a quota limits time; it does not pin CPUs
