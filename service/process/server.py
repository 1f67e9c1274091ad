"""Runs the app under uvicorn, and drains it in the way that orchestrators expect."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from camcal.service import logs
from camcal.service.engine.session import Session
from camcal.service.http.app import create_app
from camcal.service.http.dependencies import running
from camcal.service.http.protocol import guarded
from camcal.service.http.siblings import Siblings
from camcal.service.logs import Seldom
from camcal.service.mailbox import Mailbox
from camcal.service.process.listening import ListenError, Listeners, accept
from camcal.service.settings import Settings

if sys.platform != "win32":
    import resource

log = logging.getLogger("camcal")

# What a supervisor tells a worker, a byte each; a connection comes with its file descriptor.
CONNECTION, RELOAD, SPREAD, DRAIN, STOP = b"C", b"R", b"K", b"D", b"S"
# What a worker says, in lines: which version it serves, every `BEAT_S` from when it is ready; or why it ends.
SERVING, FAILED = b"+", b"-"
BEAT_S = 5.0

LAST_S = 0.1  # for the last connections to be made, and for the requests on them to arrive
FULL_S = 0.1  # before connections are accepted again when there was no file descriptor for one
ACCEPTS = 64  # connections in a row, before what is open has its turn
RESERVE = 32  # file descriptors for everything but connections: reloading, other processes, files

BROKEN_S = 10.0  # for a model that fails on every batch to be mended by a reload, before a single process ends
BROKEN = 3  # the exit code then


class Server(uvicorn.Server):
    """uvicorn with an app that can reload and drain, and which never runs out of file descriptors.

    When as many connections are open as may be, those that wait for a next request are closed; new ones wait in the
    kernel meanwhile.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI):
        super().__init__(config)
        self._app = app
        self._taking: set[asyncio.Future[Any]] = set()
        self._exhausted = Seldom(log)
        self._room = _room()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._taking:
            await asyncio.sleep(LAST_S)
        await super().shutdown(sockets)

    def full(self) -> bool:
        """Whether no more connections may be taken now; says so, and makes room."""
        connections = self.server_state.connections
        if len(connections) + len(self._taking) < self._room:
            return False
        self._exhausted("%d connections are open, all that the limit on open files allows; new ones wait", self._room)
        for connection in list(connections):
            if connection.idle:  # type: ignore[union-attr]  # of camcal.service.http.protocol
                connection.shutdown()
        return True

    def take(self, connection: socket.socket) -> None:
        """Serve a connection that was accepted elsewhere."""
        connection.setblocking(False)
        made = asyncio.ensure_future(self._loop.connect_accepted_socket(self._protocol, connection))
        self._taking.add(made)
        made.add_done_callback(self._taking.discard)

    def _protocol(self) -> asyncio.Protocol:
        # As uvicorn makes it for a socket that it listens on.
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def reload(self) -> None:
        """Load the bundle again."""
        if runtime := running(self._app):
            self._reloading = asyncio.ensure_future(runtime.served.reload())  # kept, or it might vanish before its end

    def drain(self) -> None:
        """Not ready from now on."""
        if runtime := running(self._app):
            runtime.drain()

    def stop(self) -> None:
        """Take no more connections, and end when all requests are answered."""
        self.should_exit = True


class DrainingServer(Server):
    """On SIGTERM: not ready at once, serve on for `drain_s`, then finish what runs and exit with code 0.

    SIGINT skips the wait, and a second signal ends at once. SIGHUP loads the bundle again. A model that fails on every
    batch and that no reload mends ends the server, with `broken` set.
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
        """End when all is answered: also those whom the kernel has let in already, and closing would reset."""
        self._listeners.let_nobody_else_in()
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
                self._exhausted("connections wait: %s", error.strerror)
                return self._pause()
            if connection is None:
                return
            self.take(connection)

    def _pause(self) -> None:
        for listener in self._listeners.sockets:
            self._loop.remove_reader(listener)
        self._loop.call_later(FULL_S, self._accept_again)

    def _beat(self, broken_s: float) -> None:
        """End when the model has been broken for `BROKEN_S`."""
        runtime = running(self._app)
        reason = runtime.broken if runtime else None
        if reason and broken_s >= BROKEN_S and not self.broken:
            log.error("%s; the service ends with code %d, as only a restart may help", reason, BROKEN)
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
            self._loop.call_soon_threadsafe(self._leave, self._drain_s if sig == signal.SIGTERM else 0.0)

    def _leave(self, drain_s: float) -> None:
        log.info("draining: not ready, serving for %g s more", drain_s)
        self.drain()
        self._loop.call_later(drain_s, self.stop)


class Worker(Server):
    """Serves the connections that come through `channel`, and does what its supervisor says there.

    Signals are the supervisor's business. When that is gone, the worker answers what it has and ends.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, channel: socket.socket):
        super().__init__(config, app)
        self._channel = channel

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._channel.setblocking(False)
        self._loop.add_reader(self._channel, self._hear)
        self._beat()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        pass

    def _beat(self) -> None:
        if runtime := running(self._app):
            # Another process may do better where the model is broken; the supervisor then says when to end.
            broken = runtime.broken
            line = FAILED + broken.encode() if broken else SERVING + runtime.manifest.version.encode()
            with contextlib.suppress(OSError):  # the supervisor is gone
                self._channel.send(line + b"\n")
            if not broken:
                self._loop.call_later(BEAT_S, self._beat)

    def _hear(self) -> None:
        if self.full() and self._next_word() == CONNECTION:
            self._loop.remove_reader(self._channel)
            self._loop.call_later(FULL_S, self._loop.add_reader, self._channel, self._hear)
            return
        try:
            word, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1)
        except BlockingIOError:
            return
        except OSError:
            word, descriptors = b"", []
        if word == CONNECTION:
            if descriptors:
                self.take(socket.socket(fileno=descriptors[0]))
            else:
                self._exhausted("a connection could not be taken: no file descriptor is left")
        elif word == RELOAD:
            self.reload()
        elif word == SPREAD:
            for open_connection in self.server_state.connections:
                open_connection.leave()  # type: ignore[union-attr]  # of camcal.service.http.protocol
        elif word == DRAIN:
            self.drain()
        else:
            self._loop.remove_reader(self._channel)
            self.drain()
            self.stop()

    def _next_word(self) -> bytes:
        try:
            return self._channel.recv(1, socket.MSG_PEEK)
        except OSError:
            return b""


def allow_open_files() -> None:
    """Raise the limit on open files, and so on connections, as far as this process may: the usual one is 1024."""
    if sys.platform != "win32":
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # where the system allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _room() -> int:
    """Connections that this process may have open at once."""
    if sys.platform == "win32":
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else RESERVE
    return max(1, limit - used - min(RESERVE, limit // 8)) if limit != resource.RLIM_INFINITY else sys.maxsize


def serve(settings: Settings, sessions: list[Session], listeners: Listeners) -> None:
    """Serve the model of `sessions`, one a device, until a signal comes. Empties the list: a reload frees the model.

    Raises:
        ListenError: if another service was quicker to listen on the address.
        SystemExit: with code `BROKEN`, if the model fails on every batch.
    """
    allow_open_files()
    config, app = _prepare(settings, sessions, listeners.metrics)
    server = DrainingServer(config, app, listeners, settings.drain_s)
    server.run()
    if server.broken:
        sys.exit(BROKEN)


def work(
    settings: Settings,
    sessions: list[Session],
    siblings: Siblings,
    channel: socket.socket,
    decoder: Mailbox,
    metrics: list[socket.socket],
) -> None:
    """As `serve`, as the worker of a supervisor at the other end of `channel`, with whose `decoder` it decodes.

    `metrics` are the sockets for /metrics, of which the first worker takes care.
    """
    config, app = _prepare(settings, sessions, metrics if siblings.index == 0 else [], siblings, decoder)
    Worker(config, app, channel).run()


def _prepare(
    settings: Settings,
    sessions: list[Session],
    metrics: list[socket.socket],
    siblings: Siblings | None = None,
    decoder: Mailbox | None = None,
) -> tuple[uvicorn.Config, FastAPI]:
    logs.configure(settings.log_format)
    if siblings is None or siblings.index == 0:  # the others would say the same
        manifest = sessions[0].bundle.manifest
        log.info("model %s %s, %d classes", manifest.name, manifest.version, len(manifest.classes))
        log.info("device %s, %s", sessions[0].provider, "API key required" if settings.has_keys else "no API key")
    app = create_app(settings, *sessions, siblings=siblings, decoder=decoder, metrics=metrics)
    sessions.clear()
    config = uvicorn.Config(
        app,
        http=guarded(settings.head_timeout_s),
        ws="none",
        root_path=settings.root_path,
        proxy_headers=False,  # believed as CAMCAL_TRUSTED_PROXIES says, in camcal.service.address
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=math.ceil(settings.answer_s),
    )
    # What is loaded now stays: a full collection that walks it all would hold the event loop for 20 ms.
    gc.collect()
    gc.freeze()
    return config, app
