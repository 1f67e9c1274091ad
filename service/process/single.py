"""The service as a single process, with the graceful shutdown that orchestrators expect."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from camcal.service.engine.session import Session
from camcal.service.http.dependencies import running
from camcal.service.process.listening import FULL_S, ListenError, Listeners, accept
from camcal.service.process.server import LAST_S, Server, allow_open_files, prepare
from camcal.service.settings import Settings

log = logging.getLogger("camcal")

ACCEPTS = 64  # maximum number of connections accepted per event loop iteration

BEAT_S = 5.0  # interval of the checks for a broken model
BROKEN_S = 10.0  # time for a reload to fix a broken model, before the process exits
BROKEN = 3  # the exit code for a broken model


class DrainingServer(Server):
    """Graceful shutdown: on SIGTERM, report not ready, serve for `drain_s`, finish all requests, and exit with code 0.

    SIGINT skips the wait, and a second signal exits at once. SIGHUP reloads the bundle. If the model fails on every
    batch and no reload fixes it, the server exits with `broken` set.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, listeners: Listeners, drain_s: float):
        super().__init__(config, app)
        self._listeners = listeners
        self._drain_s = drain_s
        self._signals = 0
        self.broken: str | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        try:
            self._listeners.open()
        except ListenError:
            await self.lifespan.shutdown()
            raise
        if hasattr(signal, "SIGHUP"):  # not on Windows
            self._loop.add_signal_handler(signal.SIGHUP, self.reload)
        self._accept_again()
        self._beat(0)
        log.info("listening on %s (press CTRL+C to quit)", self._listeners.address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish all requests, including those on connections in the backlog: closing the sockets would reset these."""
        self._listeners.stop_accepting()
        await asyncio.sleep(LAST_S)
        for listener in self._listeners.sockets:
            self._loop.remove_reader(listener)
            with contextlib.suppress(OSError):  # no file descriptor is left
                while connection := accept(listener):
                    self.take(connection)
        self._listeners.close()
        await super().shutdown(sockets)

    def _accept_again(self) -> None:
        for listener in self._listeners.sockets:
            self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS):
            if self.full():
                return self._pause()
            try:
                connection = accept(listener)
            except OSError as error:
                self._exhausted("cannot accept connections: %s", error.strerror)
                return self._pause()
            if connection is None:
                return
            self.take(connection)

    def _pause(self) -> None:
        for listener in self._listeners.sockets:
            self._loop.remove_reader(listener)
        self._loop.call_later(FULL_S, self._accept_again)

    def _beat(self, broken_s: float) -> None:
        """Exit when the model has been broken for `BROKEN_S`."""
        runtime = running(self._app)
        reason = runtime.broken if runtime else None
        if reason and broken_s >= BROKEN_S and not self.broken:
            log.error("%s; exiting with code %d because only a restart may help", reason, BROKEN)
            self.broken = reason
            self.drain()
            self.stop()
        else:
            self._loop.call_later(BEAT_S, self._beat, broken_s + BEAT_S if reason else 0.0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._shut_down, self._drain_s if sig == signal.SIGTERM else 0.0)

    def _shut_down(self, drain_s: float) -> None:
        log.info("draining: not ready, but serving for another %g s", drain_s)
        self.drain()
        self._loop.call_later(drain_s, self.stop)


def serve(settings: Settings, sessions: list[Session], listeners: Listeners) -> None:
    """Serve the model of `sessions`, one per device, until a signal. Empties the list, so that a reload can free it.

    Raises:
        ListenError: if another process now listens on the address.
        SystemExit: with code `BROKEN`, if the model fails on every batch.
    """
    allow_open_files()
    config, app = prepare(settings, sessions, listeners.metrics)
    server = DrainingServer(config, app, listeners, settings.drain_s)
    server.run()
    if server.broken:
        sys.exit(BROKEN)
