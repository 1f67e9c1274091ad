"""A process at its limits: no file descriptors, a model that fails, clients that keep their connections."""

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
    """Of the service's processes, so far."""
    fields = [
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in (child.pid, *workers_of(child))
    ]
    return sum(int(found[11]) + int(found[12]) for found in fields) / os.sysconf("SC_CLK_TCK")


@WORKERS
def test_silent_clients_that_take_every_file_descriptor(bundle: Bundle, workers: str) -> None:
    patient = {"CAMCAL_HEAD_TIMEOUT_S": "600", "CAMCAL_WORKERS": workers}
    with process(bundle, FEW_FILES, **patient) as (child, url), ExitStack() as stack:
        address = httpx.URL(url).host, httpx.URL(url).port
        clients = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(400)]
        assert child.stderr is not None
        full = (time.monotonic() for line in child.stderr if "new ones wait" in line)
        began, before = next(full), cpu_s(child)
        lines = 1
        while (at := next(full)) < began + 9:  # a line of each process every 5 s
            lines += 1
        assert lines <= 2 * int(workers)
        assert cpu_s(child) - before < 0.3 * (at - began)
        for client in clients:
            client.close()
        assert post(url).status_code == 200
        assert metric(url, "camcal_ready") == int(workers)


@WORKERS
def test_idle_connections_make_room_for_new_ones(bundle: Bundle, workers: str) -> None:
    with process(bundle, FEW_FILES, CAMCAL_WORKERS=workers) as (_, url), ExitStack() as stack:
        address = httpx.URL(url).host, httpx.URL(url).port
        for _ in range(400):
            client = stack.enter_context(socket.create_connection(address, timeout=20))
            client.sendall(GET)
            assert client.recv(12) == b"HTTP/1.1 200"


def test_a_single_process_whose_model_is_broken_ends(bundle: Bundle, tmp_path: Path) -> None:
    flag = tmp_path / "broken"
    program = f"""if True:
        import os
        from camcal.__main__ import main
        from camcal.service.process import single
        from camcal.service.engine import session
        single.BEAT_S, single.BROKEN_S, run = 0.1, 0.5, session.Session.run
        def fail(self, *given):
            if os.path.exists({str(flag)!r}):
                raise ArithmeticError("the device is gone")
            return run(self, *given)
        session.Session.run = fail
        main()"""
    with process(bundle, ("-c", program)) as (child, url):
        assert post(url).status_code == 200
        flag.touch()
        assert [post(url).status_code for _ in range(5)] == [500] * 5
        assert child.wait(20) == 3
        assert child.stderr is not None
        said = child.stderr.read()
    assert re.search(r"the model failed \d+ times in a row; see the log; the service ends with code 3", said)


def test_a_model_that_is_mended_in_time_is_kept(bundle: Bundle, tmp_path: Path) -> None:
    flag, beats = tmp_path / "broken", tmp_path / "beats"
    beats.touch()
    program = f"""if True:
        import os
        from camcal.__main__ import main
        from camcal.service.process import single
        from camcal.service.engine import session
        single.BEAT_S, single.BROKEN_S, run, beat = 0.1, 1000, session.Session.run, single.DrainingServer._beat
        def fail(self, *given):
            if os.path.exists({str(flag)!r}):
                raise ArithmeticError("the device is gone")
            return run(self, *given)
        def counted(self, broken_s):
            with open({str(beats)!r}, "a") as file:
                print(broken_s, file=file)
            beat(self, broken_s)
        session.Session.run, single.DrainingServer._beat = fail, counted
        main()"""
    with process(bundle, ("-c", program)) as (_, url):
        flag.touch()
        assert [post(url).status_code for _ in range(5)] == [500] * 5
        wait_for(lambda: float(beats.read_text().split()[-1]) > 0.15)
        flag.unlink()
        assert post(url).status_code == 200
        wait_for(lambda: float(beats.read_text().split()[-1]) == 0)  # what counts is how long it fails in a row
        assert httpx.get(f"{url}/health/ready").status_code == 200


def test_clients_that_keep_their_connections_are_spread_again(bundle: Bundle) -> None:
    with process(bundle, CAMCAL_WORKERS="2") as (child, url), ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=url, timeout=20)) for _ in range(12)]

        def shares() -> Counter[str]:
            answers = [client.post("/predict", content=png(), headers=RAW) for client in clients]
            assert {answer.status_code for answer in answers} == {200}
            return Counter(answer.json()["cam"]["url"][len("/cam/")] for answer in answers)

        assert shares() == {"A": 6, "B": 6}
        dead = workers_of(child)[0]
        os.kill(dead, signal.SIGKILL)
        wait_for(lambda: gone(dead))
        for client in clients:
            with suppress(httpx.TransportError):  # its worker is gone
                client.get("/health/live")
        wait_for(lambda: len(workers_of(child)) == 2 and metric(url, "camcal_ready") == 2)
        wait_for(lambda: min(shares().values()) >= 4 and len(shares()) == 2)  # and nobody sees an error
