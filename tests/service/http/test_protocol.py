"""What is not HTTP, beside requests that are: each gets its answer, and the log gets one line."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import re
import socket
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from camcal.service.engine.session import Session
from camcal.service.http.app import create_app
from camcal.service.http.protocol import GuardedProtocol, _Lingering
from camcal.service.settings import Settings
from tests.service.conftest import png
from tests.service.http.routes.test_predict import RAW
from tests.service.test_live import connect, running

LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = LIVE.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")
UPLOAD = CHUNKED.replace(b"GET /health/live", b"POST /predict").replace(b"x\r\n", b"x\r\nContent-Type: image/png\r\n")

# What comes in one packet → the statuses of its answers.
BROKEN = {
    "chunk size": (CHUNKED + b"ZZ", [400]),
    "chunk size of HEAD": (CHUNKED.replace(b"GET", b"HEAD") + b"ZZ", [400]),
    "chunk size of no route": (CHUNKED.replace(b"/health/live", b"/nothing") + b"ZZ", [400]),
    "chunk size too large": (CHUNKED + b"F" * 17 + b"\r\n", [400]),
    "chunk size of an upload": (UPLOAD + b"ZZ", [400]),
    "second chunk": (UPLOAD + b"1\r\na\r\nZZ", [400]),
    "chunk longer than its size": (UPLOAD + b"1\r\nabc\r\n", [400]),
    "trailer": (CHUNKED + b"0\r\n\x00bad\r\n\r\n", [400]),
    "trailer of an upload": (UPLOAD + b"1\r\na\r\n0\r\n\x00bad\r\n\r\n", [400]),
    "after a request": (LIVE + b"\x00\x00\r\n\r\n", [200, 400]),
    "after two requests": (LIVE + LIVE + b"RUBBISH\r\n\r\n", [200, 200, 400]),
    "chunk size after a request": (LIVE + CHUNKED + b"ZZ", [200, 400]),
    "chunk size after two requests": (LIVE + LIVE + CHUNKED + b"ZZ", [200, 200, 400]),
    "after an offer": (
        LIVE.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n") + b"RUBBISH\r\n\r\n",
        [200, 400],
    ),
    "chunk size after an offer": (
        CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n") + b"ZZ",
        [400],
    ),
    "null byte in a header": (LIVE.replace(b"x\r\n", b"x\x00y\r\n"), [400]),
    "null byte in the target": (LIVE.replace(b"/health", b"/\x00health"), [400]),
    "target that is no URL": (LIVE.replace(b"/health/live", b"http://[::1"), [400]),
    "two lengths": (LIVE.replace(b"\r\n\r\n", b"\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"), [400]),
    "length and chunks": (CHUNKED.replace(b"x\r\n", b"x\r\nContent-Length: 1\r\n") + b"0\r\n\r\n", [400]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), [400]),
}


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    with running(create_app(Settings(bundle=session.bundle.path, max_batch=session.max_batch), session)) as url:
        yield url


def statuses(connection: socket.socket) -> list[int]:
    """Of all answers until the server closes the connection."""
    with connection, connection.makefile("rb") as stream:
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", stream.read())]


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_http(url: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    sent, expected = BROKEN[name]
    connection = connect(url)
    connection.sendall(sent)
    assert statuses(connection) == expected
    assert httpx.post(f"{url}/predict", content=png(), headers=RAW).status_code == 200
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == [
        "Invalid HTTP request received."
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_rubbish_after_an_answer(url: str, caplog: pytest.LogCaptureFixture) -> None:
    connection = connect(url)
    for _ in range(2):
        connection.sendall(LIVE)
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200 ")
    connection.sendall(CHUNKED + b"ZZ")
    connection.sendall(b"more of it")
    assert statuses(connection) == [400]
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == [
        "Invalid HTTP request received."
    ]


def test_mutated_requests_leave_no_trace_in_the_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(0)
    seeds = [sent for sent, _ in BROKEN.values()]
    for _ in range(300):
        data = bytearray(rng.choice(seeds) + rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    data[at:at] = rng.choice([b"\r\n", b"\x00", b"0\r\n\r\n", b"Connection: close\r\n", b"\xff", b" "])
                case _:
                    del data[at : at + rng.randint(1, 5)]
        with connect(url) as connection:
            cut, answer = rng.choice([0, rng.randrange(len(data))]), b""
            with suppress(OSError):  # the server may have closed the connection already
                connection.sendall(data[:cut])
                connection.sendall(data[cut:])
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(10_000)
            assert b" 500 " not in answer
    assert httpx.post(f"{url}/predict", content=png(), headers=RAW).status_code == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelno > logging.WARNING]


def test_answer_to_a_client_that_reset_its_connection_is_dropped() -> None:
    async def answer() -> None:
        ours, client = socket.socketpair()
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, ours)
        lingering = _Lingering(transport, None)
        client.close()
        transport.abort()
        for _ in range(3):
            await asyncio.sleep(0)
        lingering.write(b"HTTP/1.1 200 OK\r\n\r\n")

    uvloop.run(answer())


OVERRIDDEN = {
    "__init__",
    "connection_made",
    "connection_lost",
    "pause_writing",
    "resume_writing",
    "data_received",
    "on_headers_complete",
    "on_header",
    "on_body",
    "on_message_complete",
    "on_response_complete",
    "send_400_response",
    "_start_asgi_task",
}


def test_uvicorn_still_has_the_methods_that_are_overridden() -> None:
    """A new uvicorn that renames one, or changes its parameters, would no longer call ours."""
    assert {name for name in vars(GuardedProtocol) if name in vars(HttpToolsProtocol)} >= OVERRIDDEN
    for name in OVERRIDDEN - {"__init__"}:
        ours, theirs = (inspect.signature(getattr(owner, name)) for owner in (GuardedProtocol, HttpToolsProtocol))
        assert [*ours.parameters] == [*theirs.parameters], name
