"""A server at its limits: no file descriptors left, a broken model, keep-alive connections."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from camcal.models.bundle import Bundle
from tests.service.conftest import png
from tests.service.http.routes.test_predict import RAW
from tests.service.process.test_supervisor import gone
from tests.service.process.test_supervisor import workers as workers_of
from tests.service.test_live import metric, post, process, wait_for

WORKERS = pytest.mark.parametrize("workers", ["1", "2"])
FEW_FILES = (
    "-c",
    "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (150, 150)); from camcal.__main__ import main; main()",
)
GET = b"GET /health/live HTTP/1.1\r\nHost: camcal\r\n\r\n"


def cpu_s(child: subprocess.Popen[str]) -> float:
    """CPU time of the service's processes so far."""
    fields = [
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in (child.pid, *workers_of(child))
    ]
    return sum(int(values[11]) + int(values[12]) for values in fields) / os.sysconf("SC_CLK_TCK")


@WORKERS
def test_silent_clients_that_take_every_file_descriptor(bundle: Bundle, workers: str) -> None:
    settings = {"CAMCAL_HEAD_TIMEOUT_S": "600", "CAMCAL_WORKERS": workers}
    with process(bundle, FEW_FILES, **settings) as (child, url), ExitStack() as stack:
        address = httpx.URL(url).host, httpx.URL(url).port
        clients = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(400)]
        assert child.stderr is not None
        full = (time.monotonic() for line in child.stderr if "new ones wait" in line)
        started, before = next(full), cpu_s(child)
        lines = 1
        while (at := next(full)) < started + 9:  # one line per process every 5 s
            lines += 1
        assert lines <= 2 * int(workers)
        assert cpu_s(child) - before < 0.3 * (at - started)
        for client in clients:
            client.close()
        assert post(url).status_code == 200
        assert metric(url, "camcal_ready") == int(workers)


@WORKERS
def test_idle_connections_are_closed_for_new_ones(bundle: Bundle, workers: str) -> None:
    with process(bundle, FEW_FILES, CAMCAL_WORKERS=workers) as (_, url), ExitStack() as stack:
        address = httpx.URL(url).host, httpx.URL(url).port
        for _ in range(400):
            client = stack.enter_context(socket.create_connection(address, timeout=20))
            client.sendall(GET)
            assert client.recv(12) == b"HTTP/1.1 200"


def test_single_process_with_a_broken_model_exits(bundle: Bundle, tmp_path: Path) -> None:
    flag = tmp_path / "broken"
    program = f"""if True:
        import os
        from camcal.__main__ import main
        from camcal.service.process import single
        from camcal.service.engine import session
        single.BEAT_S, single.BROKEN_S, run = 0.1, 0.5, session.Session.run
        def fail(self, *args):
            if os.path.exists({str(flag)!r}):
                raise ArithmeticError("the device is gone")
            return run(self, *args)
        session.Session.run = fail
        main()"""
    with process(bundle, ("-c", program)) as (child, url):
        assert post(url).status_code == 200
        flag.touch()
        assert [post(url).status_code for _ in range(5)] == [500] * 5
        assert child.wait(20) == 3
        assert child.stderr is not None
        log = child.stderr.read()
    assert re.search(r"the model failed \d+ times in a row; see the log; exiting with code 3", log)


def test_model_that_recovers_in_time_stays_in_use(bundle: Bundle, tmp_path: Path) -> None:
    flag, beats = tmp_path / "broken", tmp_path / "beats"
    beats.touch()
    program = f"""if True:
        import os
        from camcal.__main__ import main
        from camcal.service.process import single
        from camcal.service.engine import session
        single.BEAT_S, single.BROKEN_S, run, beat = 0.1, 1000, session.Session.run, single.DrainingServer._beat
        def fail(self, *args):
            if os.path.exists({str(flag)!r}):
                raise ArithmeticError("the device is gone")
            return run(self, *args)
        def record(self, broken_s):
            with open({str(beats)!r}, "a") as file:
                print(broken_s, file=file)
            beat(self, broken_s)
        session.Session.run, single.DrainingServer._beat = fail, record
        main()"""
    with process(bundle, ("-c", program)) as (_, url):
        flag.touch()
        assert [post(url).status_code for _ in range(5)] == [500] * 5
        wait_for(lambda: float(beats.read_text().split()[-1]) > 0.15)
        flag.unlink()
        assert post(url).status_code == 200
        wait_for(lambda: float(beats.read_text().split()[-1]) == 0)  # the time starts anew
        assert httpx.get(f"{url}/health/ready").status_code == 200


def test_keep_alive_connections_move_to_a_restarted_worker(bundle: Bundle) -> None:
    with process(bundle, CAMCAL_WORKERS="2") as (child, url), ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=url, timeout=20)) for _ in range(12)]

        def shares() -> Counter[str]:
            responses = [client.post("/predict", content=png(), headers=RAW) for client in clients]
            assert {response.status_code for response in responses} == {200}
            return Counter(response.json()["cam"]["url"][len("/cam/")] for response in responses)

        assert shares() == {"A": 6, "B": 6}
        dead = workers_of(child)[0]
        os.kill(dead, signal.SIGKILL)
        wait_for(lambda: gone(dead))
        for client in clients:
            with suppress(httpx.TransportError):  # its worker has ended
                client.get("/health/live")
        wait_for(lambda: len(workers_of(child)) == 2 and metric(url, "camcal_ready") == 2)
        wait_for(lambda: min(shares().values()) >= 4 and len(shares()) == 2)  # without any failed request
