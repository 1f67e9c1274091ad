"""Clients who mean ill, or are on a bad line: crafted and mutated files, slow ones, ones that leave or never read."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx

from tests.fuzz.mutations import mutants
from tests.service.crafted import CASES
from tests.soak.journal import Journal
from tests.soak.traffic import asked

GIVE_UP_S = 60.0
SLOW_S = 40.0  # for which a slow client drips, if it is let
GARBAGE = (
    b"GET /health/live HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",  # TLS
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    bytes(1000),
)


def write_cases(folder: Path, count: int | None) -> list[Path]:
    """The crafted files, or the first `count` of a fixed shuffle, written to a folder once."""
    folder.mkdir(parents=True, exist_ok=True)
    names = random.Random(0).sample(sorted(CASES), len(CASES))[:count]
    for name in names:
        (folder / name).write_bytes(CASES[name]())
    return [folder / name for name in names]


class Nuisance:
    """Each kind of bad client, again and again; outcomes go to a journal."""

    def __init__(self, url: str, journal: Journal, cases: list[Path], seed: int):
        self._journal, self._url, self._random = journal, url, random.Random(seed)
        self._cases: Iterator[Path] = itertools.cycle(cases)
        self._mutants = itertools.cycle(mutants(100_000, seed))
        self._address = httpx.URL(url).host, httpx.URL(url).port or 80

    async def run(self, every: float) -> None:
        """Until it is cancelled: a crafted file each `every` seconds, the other kinds as often or less."""
        kinds: list[tuple[Callable[[], Awaitable[None]], float]] = [
            (self._crafted, every),
            (self._mutated, every / 2),
            (self._gone, 2 * every),
            (self._garbage, 2 * every),
            (self._slow_head, 8 * every),
            (self._slow_body, 8 * every),
            (self._never_reads, 8 * every),
        ]
        async with asyncio.TaskGroup() as group:
            for kind, pause in kinds:
                group.create_task(self._again(group, kind, pause))

    async def _again(self, group: asyncio.TaskGroup, kind: Callable[[], Awaitable[None]], pause: float) -> None:
        waiting: set[asyncio.Task[None]] = set()
        while True:
            await asyncio.sleep(pause * self._random.uniform(0.5, 1.5))
            if len(waiting) < 8:  # of one kind at once
                waiting.add(task := group.create_task(self._guarded(kind)))
                task.add_done_callback(waiting.discard)

    async def _guarded(self, kind: Callable[[], Awaitable[None]]) -> None:
        began, name = self._journal.now(), kind.__name__.strip("_").replace("_", "-")
        try:
            await kind()
        except ConnectionRefusedError:
            self._journal.note(name, "refused", began)
        except OSError:
            self._journal.note(name, "closed", began)  # as it should be

    async def _crafted(self) -> None:
        path = next(self._cases)
        await self._send("crafted", path.name, await asyncio.to_thread(path.read_bytes))

    async def _mutated(self) -> None:
        await self._send("mutated", *next(self._mutants))

    async def _send(self, kind: str, name: str, data: bytes) -> None:
        began = self._journal.now()
        form = self._random.random() < 0.3
        request = {"files": {"image": data}} if form else {"content": data, "headers": {"Content-Type": "image/png"}}
        async with httpx.AsyncClient(timeout=GIVE_UP_S, trust_env=False) as client:
            outcome = await asked(client, method="POST", url=f"{self._url}/predict", **request)
        self._journal.note(kind, outcome, began, name)

    async def _gone(self) -> None:
        """Leaves in its body, or as soon as it has asked."""
        data, began = next(self._mutants)[1], self._journal.now()
        sent = data if self._random.random() < 0.5 else data[: len(data) // 2]
        async with self._connection() as (_, writer):
            writer.write(_head(len(data)) + sent)
            await writer.drain()
        self._journal.note("gone", "left", began)

    async def _garbage(self) -> None:
        began = self._journal.now()
        async with self._connection() as (reader, writer):
            writer.write(self._random.choice(GARBAGE))
            await self._read(reader, "garbage", began)

    async def _slow_head(self) -> None:
        await self._drip("slow-head", _head(1000)[:-2], b"X-Slow: 1\r\n" * 1000)

    async def _slow_body(self) -> None:
        await self._drip("slow-body", _head(1_000_000), bytes(1_000_000))

    async def _drip(self, kind: str, at_once: bytes, rest: bytes) -> None:
        async def drip(writer: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                for byte in rest:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.5)

        began = self._journal.now()
        async with self._connection() as (reader, writer):
            writer.write(at_once)
            dripping = asyncio.create_task(drip(writer))
            try:
                await self._read(reader, kind, began, SLOW_S)
            finally:
                dripping.cancel()

    async def _never_reads(self) -> None:
        """Asks for much, and takes none of it."""
        began = self._journal.now()
        async with self._connection() as (_, writer):
            writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 500)
            await asyncio.sleep(SLOW_S)
        self._journal.note("never-reads", "left", began)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, kind: str, began: float, longest: float = GIVE_UP_S) -> None:
        """Note the status that comes, or that the connection ended without one."""
        try:
            async with asyncio.timeout(longest):
                words = (await reader.readline()).split()
            self._journal.note(kind, words[1].decode() if len(words) > 1 else "closed", began)
        except TimeoutError:
            self._journal.note(kind, "left", began)


def _head(length: int) -> bytes:
    lines = ["POST /predict HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines).encode()
