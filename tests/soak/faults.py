"""What is done to the server while it works: reloads of good and hostile bundles, killed workers and helpers."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import httpx

from tests.service.hostile import HOSTILE, edit, make
from tests.soak.journal import Journal
from tests.soak.server import Server

LOADED_S = 60.0  # for a good bundle to be served by every worker
# What the command lines of a worker and of the decode helper have.
WORKER, HELPER = " serve ", " camcal.service.engine.decoder "


class Current:
    """The folder that the server serves: a link that is moved from one bundle to another."""

    def __init__(self, source: Path, work: Path):
        self._source, self._work, self._numbers = source, work, itertools.count(1)
        self._hostile = itertools.cycle(HOSTILE.items())
        self.link = work / "current"
        self.good()

    def good(self) -> str:
        """Point the link at a bundle of a version never seen before, which it gives."""
        version = f"soak-{next(self._numbers)}"
        folder = shutil.copytree(self._source, self._work / version)
        edit(folder, lambda manifest: manifest.update(version=version))
        self._move(folder)
        return version

    def bad(self) -> str:
        """Point the link at the next hostile bundle; what it is called."""
        name, (spoil, _) = next(self._hostile)
        folder = self._work / "hostile"
        shutil.rmtree(folder, ignore_errors=True)
        self._move(make(self._source, folder / name, spoil))
        return name

    def _move(self, target: Path) -> None:
        (self._work / "next").symlink_to(target)
        os.replace(self._work / "next", self.link)


class Faults:
    """One after another, in a fixed order."""

    def __init__(self, server: Server, current: Current, workers: int, journal: Journal, seed: int):
        self._server, self._current, self._workers = server, current, workers
        self._journal, self._random = journal, random.Random(seed)

    async def run(self, every: float, seconds: float) -> None:
        """One each `every` seconds, for so many seconds; the last one is brought to its end."""
        order: list[Callable[[], Awaitable[None]]] = [self.reload, self.kill_worker, self.reload_hostile]
        order += [self.reload, self.kill_helper, self.reload_hostile]
        for fault in itertools.cycle(order):
            if self._journal.now() + every >= seconds:
                return
            await asyncio.sleep(every)
            await fault()

    async def reload(self) -> None:
        """A good bundle, until every worker serves it."""
        at, version = self._journal.now(), await asyncio.to_thread(self._current.good)
        self._server.process.send_signal(signal.SIGHUP)
        loaded = await self._served_everywhere(version)
        detail = f"{version} in {self._journal.now() - at:.1f} s" if loaded else f"{version} never"
        self._journal.event("reload", detail, at)

    async def reload_hostile(self) -> None:
        """A hostile bundle; the next good one shows whether it did harm."""
        self._journal.event("hostile", await asyncio.to_thread(self._current.bad))
        self._server.process.send_signal(signal.SIGHUP)

    async def kill_worker(self) -> None:
        """One of several: a single process has nobody who would replace it."""
        found = [pid for pid, command in self._server.children().items() if WORKER in f"{command} "]
        await self._kill("worker", found if self._workers > 1 else [])

    async def kill_helper(self) -> None:
        """The process that decodes what may be expensive, if there is one."""
        await self._kill("helper", [pid for pid, command in self._server.children().items() if HELPER in f"{command} "])

    async def _kill(self, what: str, pids: list[int]) -> None:
        if pids:
            pid = self._random.choice(pids)
            self._journal.event(f"kill {what}", f"process {pid}")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def _served_everywhere(self, version: str) -> bool:
        """Whether within `LOADED_S` several fresh connections for each worker find nothing but this version."""
        end = self._journal.now() + LOADED_S
        while self._journal.now() < end:
            found = [await self._version() for _ in range(4 * self._workers)]
            if set(found) == {version}:
                return True
            await asyncio.sleep(0.5)
        return False

    async def _version(self) -> str | None:
        with suppress(httpx.HTTPError, KeyError, ValueError):
            async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
                answer = await client.get(f"{self._server.url}/model")
                return str(answer.json()["version"])
        return None
