"""The load: many keep-alive connections from one process that does little else than copy bytes.

Run as a process of its own: a `Load` as JSON on standard input, what happened as JSON on standard output.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import httptools
import uvloop
from pydantic import BaseModel, ConfigDict, Field

GIVE_UP_S = 30.0
MAX_CONNECTIONS = 900  # below the usual limit of 1024 open files; in an open loop further requests wait, and it counts
FAILED = 0  # the status of a request without an answer
BOUNDARY = "photograph"

Form = Literal["raw", "multipart"]


class Load(BaseModel):
    """What to send, and how.

    photos: folder of the files to send, in turns.
    form: `raw` sends a file as the body, `multipart` as a part with the name `field`.
    headers: lines of the request's head beside the usual ones.
    clients: a closed loop of so many connections, each with one request at a time; or
    rate: an open loop of Poisson arrivals, so many a second.
    seconds: for how long. count: stop a closed loop earlier, after so many requests.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    port: int
    path: str
    photos: Path
    form: Form = "raw"
    field: str = "image"
    headers: str = ""
    clients: int | None = Field(default=None, ge=1)
    rate: float | None = Field(default=None, gt=0)
    seconds: float = Field(gt=0)
    count: int | None = None
    seed: int = 0


class Outcome(BaseModel):
    """What happened. Times in seconds; `records` holds (start, latency, status), the start counted from the first.

    An open loop counts latency from the moment when the request was due, so that a stalled server cannot hide it.
    """

    records: list[tuple[float, float, int]]
    cpu_s: float
    wall_s: float


def requests_of(load: Load) -> list[bytes]:
    """One complete HTTP request for each file."""
    return [_request(load, photo.read_bytes()) for photo in sorted(load.photos.iterdir())]


def body_of(form: Form, field: str, photo: bytes) -> tuple[str, bytes]:
    """Content type and body of a request."""
    if form == "raw":
        return "image/jpeg", photo
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="photo.jpg"\r\n'
    body = b"%sContent-Type: image/jpeg\r\n\r\n%s\r\n--%s--\r\n" % (part.encode(), photo, BOUNDARY.encode())
    return f"multipart/form-data; boundary={BOUNDARY}", body


def _request(load: Load, photo: bytes) -> bytes:
    kind, body = body_of(load.form, load.field, photo)
    head = f"POST {load.path} HTTP/1.1\r\nHost: 127.0.0.1:{load.port}\r\nContent-Type: {kind}\r\n"
    return f"{head}{load.headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One keep-alive connection; `ask` sends a request and waits for the status of its answer."""

    def __init__(self) -> None:
        self.closed = False
        self._answer: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class, which has no common base
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.closed = True
            self._transport.close()
        self._resolve(status)
        self._parser = httptools.HttpResponseParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._resolve(FAILED)

    def _resolve(self, status: int) -> None:
        if self._answer is not None and not self._answer.done() and status != 100:
            self._answer.set_result(status)

    async def ask(self, request: bytes) -> int:
        """The status of the answer, or `FAILED` if none came within `GIVE_UP_S`."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await asyncio.wait_for(self._answer, GIVE_UP_S)
        except TimeoutError:
            self.close()
            return FAILED

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        self._transport.close()


class Generator:
    """Sends a load and notes what happens."""

    def __init__(self, load: Load):
        self.load = load
        self.records: list[tuple[float, float, int]] = []
        self._requests: Iterator[bytes] = itertools.cycle(requests_of(load))
        self._idle: list[Connection] = []
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._left = load.count if load.count is not None else sys.maxsize

    async def run(self) -> None:
        """Send all of it and wait for the last answer."""
        self._began = time.perf_counter()
        self._end = self._began + self.load.seconds
        if self.load.clients is not None:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.load.clients):
                    tasks.create_task(self._closed_loop())
        elif self.load.rate is not None:
            await self._open_loop(self.load.rate)
        for connection in self._idle:
            connection.close()

    async def _closed_loop(self) -> None:
        while time.perf_counter() < self._end and self._left > 0:
            self._left -= 1
            await self._ask(time.perf_counter())

    async def _open_loop(self, rate: float) -> None:
        arrivals = random.Random(self.load.seed)
        due = self._began
        async with asyncio.TaskGroup() as tasks:
            while (due := due + arrivals.expovariate(rate)) < self._end:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.create_task(self._ask(due))

    async def _ask(self, due: float) -> None:
        status = FAILED
        try:
            async with self._room:
                connection = await self._connection()
                status = await connection.ask(next(self._requests))
                if not connection.closed:
                    self._idle.append(connection)
        except OSError:
            await asyncio.sleep(0.01)  # refused: the server is down, and a closed loop must not spin
        self.records.append((due - self._began, time.perf_counter() - due, status))

    async def _connection(self) -> Connection:
        while self._idle:
            if not (connection := self._idle.pop()).closed:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, "127.0.0.1", self.load.port)
        return connection


def main() -> None:
    """Read a load, send it, print the outcome."""
    generator = Generator(Load.model_validate_json(sys.stdin.read()))
    gc.freeze()
    began = time.perf_counter()
    cpu = time.process_time()
    uvloop.run(generator.run())
    outcome: dict[str, Any] = {
        "records": generator.records,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - began,
    }
    json.dump(outcome, sys.stdout)


if __name__ == "__main__":
    main()
