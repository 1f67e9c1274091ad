"""Tests with a real server: concurrent clients, disconnects, slow clients, signals."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Response

from camcal.models.bundle import Bundle
from camcal.service.engine import predictor
from camcal.service.engine.decoding import decode
from camcal.service.engine.session import Session
from camcal.service.http import body, protocol
from camcal.service.http.app import create_app
from camcal.service.http.protocol import guarded
from camcal.service.process.listening import stop_accepting
from camcal.service.settings import Settings
from tests.service.conftest import GatedSession, png
from tests.service.http.routes.test_predict import RAW, problem

ROOT = Path(__file__).parents[2]
MAIN = "from camcal.__main__ import main"  # for programs that patch something before they run `main()`

Live = Callable[..., str]


@pytest.fixture
def live() -> Iterator[Live]:
    """Starts an app on a real socket, in a thread of this process, and returns its URL."""
    with ExitStack() as stack:

        def start(session: Session, **options: Any) -> str:
            settings = Settings(bundle=session.bundle.path, max_batch=session.max_batch, **options)
            return stack.enter_context(running(create_app(settings, session)))

        yield start


@contextmanager
def running(app: Any) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    http = guarded(app.state.settings.head_timeout_s)
    server = uvicorn.Server(uvicorn.Config(app, http=http, ws="none", log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    app.state.server = server
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    wait_for(lambda: server.started)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(10)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=60).text  # a starved machine answers late
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def post(url: str, seed: int = 0, headers: dict[str, str] = RAW, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/predict", content=png(seed), headers=headers, timeout=15, **options)


def test_responses_are_not_mixed_up(live: Live, session: Session) -> None:
    url = live(session)
    alone = [post(url, seed).json()["predictions"] for seed in range(12)]

    def send(number: int) -> None:
        seed = number % 12
        body = post(url, seed, params={"top_k": 1 + number % 5}).json()
        for prediction, expected in zip(body["predictions"], alone[seed], strict=False):
            assert prediction["class_id"] == expected["class_id"]
            assert prediction["logit"] == pytest.approx(expected["logit"], rel=1e-3, abs=1e-3)
        numbers = httpx.get(url + body["cam"]["url"], params={"format": "json"}).json()
        assert numbers["sum"] == pytest.approx(body["predictions"][0]["calibrated_logit"], rel=1e-3, abs=1e-3)

    with ThreadPoolExecutor(12) as clients:
        list(clients.map(send, range(72)))


def test_requests_share_batches_while_the_model_is_busy(
    live: Live, gated: GatedSession, submitted: list[object]
) -> None:
    url = live(gated)
    gated.sizes.clear()
    gated.close()
    with ThreadPoolExecutor(8) as clients:
        first = clients.submit(post, url)
        assert gated.waiting.acquire(timeout=30)
        later = [clients.submit(post, url, seed) for seed in range(1, 6)]
        wait_for(lambda: len(submitted) == 6)
        assert metric(url, "camcal_queue_depth") == 5
        gated.open()
        assert [response.result().status_code for response in (first, *later)] == [200] * 6
    assert gated.sizes == [1, 5]
    assert metric(url, "camcal_batch_padding_total") == 3


def test_full_queue(live: Live, gated: GatedSession) -> None:
    url = live(gated, queue_limit=2, client_share=1)
    gated.close()
    with ThreadPoolExecutor(8) as clients:
        running = clients.submit(post, url)
        assert gated.waiting.acquire(timeout=30)
        waiting = [clients.submit(post, url) for _ in range(2)]
        wait_for(lambda: metric(url, "camcal_queue_depth") == 2)
        refused = post(url)
        assert "2 requests are waiting; the limit is 2" in problem(refused, 429, "queue-full")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        gated.open()
        assert [response.result().status_code for response in (running, *waiting)] == [200] * 3
    assert metric(url, 'camcal_rejected_total{reason="queue_full"}') == 1
    assert post(url).status_code == 200


def test_deadline(live: Live, gated: GatedSession) -> None:
    url = live(gated, timeout_s=2)
    gated.close()
    with ThreadPoolExecutor(2) as clients:
        running = clients.submit(post, url)
        assert gated.waiting.acquire(timeout=30)
        problem(post(url), 504, "deadline-passed")
        gated.open()
        assert running.result().status_code == 200
    assert metric(url, 'camcal_rejected_total{reason="deadline"}') == 1
    assert gated.sizes[-1] == 1


def test_timeout_of_the_client(live: Live, gated: GatedSession) -> None:
    url = live(gated)
    gated.close()
    with ThreadPoolExecutor(2) as clients:
        running = clients.submit(post, url)
        assert gated.waiting.acquire(timeout=30)
        headers = RAW | {"X-Request-Timeout-Ms": "200"}
        problem(httpx.post(f"{url}/predict", content=png(), headers=headers), 504, "deadline-passed")
        gated.open()
        assert running.result().status_code == 200
    headers = RAW | {"X-Request-Timeout-Ms": "9999999"}
    assert httpx.post(f"{url}/predict", content=png(), headers=headers).status_code == 200
    headers = RAW | {"X-Request-Timeout-Ms": "0"}
    refused = httpx.post(f"{url}/predict", content=png(), headers=headers)
    assert "X-Request-Timeout-Ms is '0'" in problem(refused, 422, "invalid-parameter")


def test_deadline_passes_before_decoding(live: Live, gated: GatedSession) -> None:
    url = live(gated, timeout_s=1e-9)
    response = httpx.post(f"{url}/predict", content=b"no image", headers=RAW)  # never decoded
    problem(response, 504, "deadline-passed")


def test_deadline_passes_while_every_thread_decodes(
    live: Live, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, gate = threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        started.set()
        assert gate.wait(30)
        return decode(*arguments, **options)

    monkeypatch.setattr(predictor, "decode", slow)
    url = live(session, decode_threads=1)
    problem(post(url, headers=RAW | {"X-Request-Timeout-Ms": "1000"}), 504, "deadline-passed")
    assert started.is_set()
    headers = {"X-Request-Timeout-Ms": "50"}
    problem(post(url, headers=RAW | headers), 504, "deadline-passed")
    problem(httpx.post(f"{url}/predict/batch", files={"image": png()}, headers=headers), 504, "deadline-passed")
    infer = f"{url}/v2/models/{session.bundle.manifest.name}/infer"
    assert httpx.post(infer, content=b"{}", headers=headers).status_code == 504
    assert metric(url, "camcal_queue_depth") == 0
    assert metric(url, "camcal_queue_bytes") == len(png())  # the thread still uses it
    gate.set()
    wait_for(lambda: metric(url, "camcal_queue_bytes") == 0)
    assert post(url).status_code == 200


def test_disconnected_client_is_skipped(live: Live, gated: GatedSession) -> None:
    url = live(gated)
    gated.sizes.clear()
    gated.close()
    with ThreadPoolExecutor(4) as clients:
        running = clients.submit(post, url)
        assert gated.waiting.acquire(timeout=30)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/predict", content=png(1), headers=RAW, timeout=0.3)
        waiting = clients.submit(post, url, 2)
        wait_for(lambda: metric(url, "camcal_cancelled_total") == 1 and metric(url, "camcal_queue_depth") == 1)
        gated.open()
        assert running.result().status_code == waiting.result().status_code == 200
    assert gated.sizes == [1, 1]
    assert metric(url, 'camcal_requests_total{code="499",route="/predict"}') == 1


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def head(length: int) -> bytes:
    lines = ["POST /predict HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines).encode()


def received(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of the response. The server must then close the connection."""
    with connection, connection.makefile("rb") as stream:
        response = stream.read()
    header, _, body = response.partition(b"\r\n\r\n")
    return int(header.split()[1]), json.loads(body)


def test_slow_body(live: Live, session: Session) -> None:
    connection = connect(live(session, body_timeout_s=0.2))
    connection.sendall(head(1000) + b"\x89PNG")
    status, body = received(connection)
    assert (status, body["type"]) == (408, "urn:camcal:error:body-timeout")


def test_body_below_the_minimum_rate(live: Live, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "PAUSE_S", 0.2)
    url = live(session)
    small = connect(url)
    small.sendall(head(70_000) + bytes(body.SMALL_BYTES))  # no minimum rate up to this size
    paused = connect(url)
    paused.sendall(head(1_000_000) + bytes(500_000))
    status, problem = received(paused)
    assert (status, problem["type"]) == (408, "urn:camcal:error:body-timeout")
    assert problem["detail"] == "the body arrived at less than 16384 bytes per second (CAMCAL_MIN_BODY_RATE)"
    small.sendall(bytes(70_000 - body.SMALL_BYTES))
    small.settimeout(10)
    assert small.recv(10_000).startswith(b"HTTP/1.1 415 ")
    small.close()


def test_body_at_the_minimum_rate_may_take_long(live: Live, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "PAUSE_S", 3.0)
    with connect(live(session, min_body_rate=10_000)) as connection:
        connection.sendall(head(500_000) + bytes(100_000))
        for _ in range(40):  # longer than PAUSE_S, at ten times the rate: the machine may be busy
            time.sleep(0.1)
            connection.sendall(bytes(10_000))
        assert connection.recv(10_000).startswith(b"HTTP/1.1 415 ")


def test_incomplete_bodies_leave_room_for_others(live: Live, session: Session) -> None:
    url = live(session, trusted_proxies="127.0.0.1", queue_bytes=2**22, max_bytes=600_000)
    with ExitStack() as stack:
        for _ in range(13):
            paused = stack.enter_context(connect(url))
            paused.sendall(head(500_000) + bytes(400_000))
        wait_for(lambda: metric(url, 'camcal_rejected_total{reason="client_bytes"}') > 0)
        assert metric(url, "camcal_queue_bytes") > 2**21
        other = RAW | {"X-Forwarded-For": "203.0.113.7"}
        assert httpx.post(f"{url}/predict", content=bytes(500_000), headers=other).status_code == 415
        assert post(url, headers=other).status_code == 200


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    with connection, connection.makefile("rb") as stream:
        return stream.read()


def status(connection: socket.socket) -> int:
    """Read the next response and return its status. The connection stays open."""
    response = HTTPResponse(connection)
    response.begin()
    response.read()
    return response.status


def wait_until_read(connection: socket.socket) -> None:
    """Wait until the server has read everything, so that the next data is a new packet."""
    client, server = (f":{address[1]:04X}" for address in (connection.getsockname(), connection.getpeername()))

    def unread() -> Iterator[str]:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            local, remote, _, queues = line.split()[1:5]
            if local.endswith(server) and remote.endswith(client):
                yield queues.partition(":")[2]

    wait_for(lambda: all(int(size, 16) == 0 for size in unread()))


def test_slow_head(live: Live, session: Session) -> None:
    url = live(session, head_timeout_s=2)
    silent, slow, later, dripping = (connect(url) for _ in range(4))
    slow.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-")
    later.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status(later) == 200
    later.sendall(b"GET /health/live HT")  # after a complete request
    dripping.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status(dripping) == 200
    dripping.sendall(b"\r\n")  # neither a head nor silence
    assert read_all(silent) == b""
    assert read_all(slow).startswith(b"HTTP/1.1 408 ")
    assert read_all(later).startswith(b"HTTP/1.1 408 ")
    assert read_all(dripping).startswith(b"HTTP/1.1 408 ")


def test_idle_connection_outlives_the_head_timeout(live: Live, session: Session) -> None:
    url, image = live(session, head_timeout_s=1), png()
    with connect(url) as connection:
        connection.sendall(head(len(image)).replace(b"/predict", b"/predict?top_k=0") + image)
        assert status(connection) == 422  # before the body is read
        for _ in range(2):
            read_all(connect(url))  # takes head_timeout_s
            connection.sendall(head(len(image)) + image)
            assert status(connection) == 200


def test_endless_head(live: Live, session: Session) -> None:
    connection = connect(live(session))
    connection.sendall(b"GET /health/live HTTP/1.1\r\n")
    with pytest.raises(OSError):  # reset or broken pipe, whichever comes first
        for number in range(10_000):
            connection.sendall(b"X-%d: " % number + b"x" * 1000 + b"\r\n")
    connection.close()


def test_endless_head_behind_an_unanswered_request(live: Live, gated: GatedSession) -> None:
    image = png()
    with connect(live(gated)) as connection:
        gated.close()
        connection.sendall(head(len(image)) + image)
        assert gated.waiting.acquire(timeout=30)
        with pytest.raises(OSError):
            connection.sendall(b"GET /health/live HTTP/1.1\r\n")
            for number in range(20_000):
                connection.sendall(b"X-%d: " % number + b"x" * 1000 + b"\r\n")
        gated.open()


LONG = 40_000_000  # bytes, more than socket buffers hold


@pytest.fixture
def long_response(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, uvicorn.Server]]:
    monkeypatch.setattr(protocol, "STALL_S", 0.3)
    app = FastAPI()
    app.state.settings = Settings(bundle=Path("x"))
    app.add_api_route("/", lambda: Response(bytes(LONG)))
    with running(app) as url:
        yield url, app.state.server


@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"])
def test_client_that_does_not_read_is_disconnected(long_response: tuple[str, uvicorn.Server], header: bytes) -> None:
    url, server = long_response
    with connect(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n")
        wait_for(lambda: server.server_state.total_requests == 1 and not server.server_state.connections)
        size = 0
        with suppress(ConnectionResetError):
            while part := connection.recv(2**20):
                size += len(part)
    assert size < LONG


def test_slow_reader_gets_the_whole_response(
    long_response: tuple[str, uvicorn.Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "STALL_S", 1.0)
    url, _ = long_response
    with connect(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        size = 0
        while part := connection.recv(2**22):
            size += len(part)
            time.sleep(0.05)
    assert size > LONG


def test_endless_trailers(live: Live, session: Session) -> None:
    with connect(live(session)) as connection:
        chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        connection.sendall(chunked + b"1\r\na\r\n0\r\n")
        with pytest.raises(OSError):
            for number in range(20_000):
                connection.sendall(b"X-%d: " % number + b"x" * 1000 + b"\r\n")


def test_chunked_body_with_trailers(live: Live, session: Session) -> None:
    image = png()
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (image[:100], image[100:]))
    with connect(live(session)) as connection:
        chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        connection.sendall(chunked + body + b"0\r\nX-Sum: 1\r\n\r\n")
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200 ")


def test_client_disconnects_during_its_body(live: Live, session: Session) -> None:
    url = live(session)
    with connect(url) as connection:
        connection.sendall(head(1000) + b"\x89PNG")
    wait_for(lambda: metric(url, "camcal_cancelled_total") == 1)
    assert metric(url, "camcal_queue_bytes") == 0


def test_content_length_is_checked_before_the_body(live: Live, session: Session) -> None:
    connection = connect(live(session))
    connection.sendall(head(10**12))
    assert received(connection)[0] == 413


def test_body_after_an_early_response_is_skipped(live: Live, session: Session) -> None:
    with connect(live(session)) as connection:
        connection.sendall(head(300_000).replace(b"/predict", b"/predict?top_k=0"))
        assert status(connection) == 422
        for _ in range(10):
            connection.sendall(bytes(30_000))
            wait_until_read(connection)
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(connection) == 200


def test_endless_body_is_cut_off(live: Live, session: Session) -> None:
    url = live(session, max_bytes=50_000)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield bytes(10_000)

    problem(httpx.post(f"{url}/predict", content=endless(), headers=RAW), 413, "too-large")
    assert sent < 200_000_000


def test_response_before_the_end_of_the_body_reaches_the_client(live: Live, session: Session) -> None:
    connection = connect(live(session))
    connection.sendall(head(30_000_000).replace(b"image/png", b"text/plain"))
    connection.sendall(bytes(30_000_000))  # all of it, before the response is read
    status, body = received(connection)
    assert (status, body["type"]) == (415, "urn:camcal:error:unsupported-format")


@pytest.mark.parametrize("together", [True, False], ids=["one packet", "several"])
@pytest.mark.parametrize("offered", [b"h2c", b"websocket"])
def test_upgrade_to_another_protocol_is_ignored(live: Live, session: Session, offered: bytes, together: bool) -> None:
    image = png()
    offer = b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\nHTTP2-Settings: AAMAAABk\r\n\r\n" % offered
    request = head(len(image)).removesuffix(b"\r\n\r\n") + offer
    with connect(live(session)) as connection:
        for _ in range(2):  # over one connection
            for part in [request + image] if together else [request[:150], request[150:], image[:40], image[40:]]:
                connection.sendall(part)
                wait_until_read(connection)
            assert status(connection) == 200
        connection.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n")
        assert connection.recv(10_000).startswith(b"HTTP/1.1 4")


@contextmanager
def process(
    bundle: Bundle | Path, program: tuple[str, str] = ("-m", "camcal"), **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python -m camcal serve` on a free port."""
    folder = bundle.path if isinstance(bundle, Bundle) else bundle
    command = [sys.executable, *program, "serve", "--bundle", str(folder), "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, env={"CAMCAL_MAX_BATCH": "2", **environment}, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stderr is not None
            log = iter(child.stderr.readline, "")
            url = next(match[1] for line in log if (match := re.search(r"on ((http://|unix:)\S+)", line)))
            yield child, url
        finally:
            child.kill()


def test_sighup_during_startup_is_ignored(bundle: Bundle) -> None:
    command = [sys.executable, "-m", "camcal", "serve", "--bundle", str(bundle.path), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stderr is not None
            status = Path(f"/proc/{child.pid}/status")
            wait_for(lambda: re.search(r"SigIgn:\s*\w+[13579bdf]\b", status.read_text()) is not None)
            child.send_signal(signal.SIGHUP)
            assert any("http://" in line for line in iter(child.stderr.readline, ""))
        finally:
            child.kill()


def test_sigterm_while_the_model_is_loading_exits_at_once(bundle: Bundle) -> None:
    slow = "from camcal.service.engine import model; model.load_proven = lambda *_: time.sleep(30)"
    program = f"import time; {MAIN}; {slow}; main()"
    command = [sys.executable, "-c", program, "serve", "--bundle", str(bundle.path), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT) as child:
        try:
            caught = Path(f"/proc/{child.pid}/status")
            # Process 1 of a container ignores signals without a handler, so one must be installed.
            wait_for(lambda: int(re.search(r"SigCgt:\s*(\w+)", caught.read_text())[1], 16) >> 14 & 1 == 1)  # type: ignore[index]
            child.send_signal(signal.SIGTERM)
            assert child.wait(30) == 143
        finally:
            child.kill()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_drains(bundle: Bundle, workers: str) -> None:
    with process(bundle, CAMCAL_DRAIN_S="1", CAMCAL_WORKERS=workers) as (child, url):
        assert httpx.get(f"{url}/health/ready").status_code == 200
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
        assert post(url).status_code == 200
        assert child.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health/live")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_as_many_connections_as_the_system_allows(bundle: Bundle, workers: str) -> None:
    limited = f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (200, 900)); {MAIN}; main()"
    with process(bundle, ("-c", limited), CAMCAL_WORKERS=workers) as (_, url), ExitStack() as stack:
        address = httpx.URL(url).host, httpx.URL(url).port
        clients = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(600)]
        for client in clients:
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: camcal\r\n\r\n")
        assert {client.recv(12) for client in clients} == {b"HTTP/1.1 200"}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_accepted_connections_are_served_during_shutdown(bundle: Bundle, workers: str) -> None:
    with process(bundle, CAMCAL_DRAIN_S="0.5", CAMCAL_WORKERS=workers) as (child, url):
        address = httpx.URL(url).host, httpx.URL(url).port
        responses = [0] * 24

        def send(client: int) -> None:
            """Send requests over new connections until the service has ended."""
            while True:
                try:
                    connection = socket.create_connection(address, timeout=30)
                except ConnectionRefusedError:
                    return
                with connection:
                    connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: camcal\r\n\r\n")
                    assert connection.recv(12) == b"HTTP/1.1 200"
                responses[client] += 1

        with ThreadPoolExecutor(24) as threads:
            sending = threads.map(send, range(24))
            wait_for(lambda: min(responses) > 0)
            child.send_signal(signal.SIGTERM)
            list(sending)
        assert child.wait(30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs a socket filter")
def test_listener_that_stops_accepting_keeps_its_backlog() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address, timeout=30) as early:
            stop_accepting(listener)
            with pytest.raises(TimeoutError):  # ignored: neither refused, nor accepted and reset later
                socket.create_connection(address, timeout=0.3)
            early.sendall(b"still here")
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.recv(10) == b"still here"
        with pytest.raises(TimeoutError):
            listener.settimeout(0.1)
            listener.accept()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a socket filter")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_new_connections_during_shutdown_are_ignored(bundle: Bundle, workers: str) -> None:
    program = "-c", f"{MAIN}; from camcal.service.process import server; server.LAST_S = 3; main()"
    with process(bundle, program, CAMCAL_WORKERS=workers) as (child, url):
        child.send_signal(signal.SIGINT)
        with pytest.raises(TimeoutError):
            while True:  # until it has received the signal
                socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), timeout=0.5).close()
        assert child.wait(30) == 0


def test_sigint_does_not_drain_and_a_second_signal_exits_at_once(bundle: Bundle) -> None:
    with process(bundle, CAMCAL_DRAIN_S="60") as (child, _):
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0
    with process(bundle, CAMCAL_DRAIN_S="60") as (child, url):
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
        child.send_signal(signal.SIGTERM)
        child.wait(30)


def test_behind_a_proxy_that_strips_a_prefix(bundle: Bundle) -> None:
    with process(bundle, CAMCAL_ROOT_PATH="/vision/v1") as (_, url):
        address = post(url).json()["cam"]["url"]
        assert address.startswith("/vision/v1/cam/")
        assert httpx.get(url + address.removeprefix("/vision/v1")).headers["content-type"] == "image/png"
        assert httpx.get(f"{url}/v2/nothing").json().keys() == {"error"}
        assert httpx.get(f"{url}/openapi.json").json()["servers"] == [{"url": "/vision/v1"}]
        assert metric(url, 'camcal_requests_total{code="200",route="/cam/{id}"}') == 1


def test_head_has_no_body(live: Live, session: Session) -> None:
    with httpx.Client(base_url=live(session)) as client:  # one connection: a body would look like the next response
        assert client.head("/openapi.json").status_code == 200
        assert client.get("/health/live").json() == {"status": "alive"}
