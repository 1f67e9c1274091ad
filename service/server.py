"""Runs the app under uvicorn, and drains it in the way that orchestrators expect."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import math
import signal
import socket
import struct
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from service import logs
from service.app import create_app
from service.protocol import guarded
from service.runtime import running
from service.session import Session
from service.settings import Settings
from service.siblings import Siblings

if sys.platform != "win32":
    import resource

log = logging.getLogger("camcal")

# What a supervisor tells a worker, a byte each; a connection comes with its file descriptor.
CONNECTION, RELOAD, DRAIN, STOP = b"C", b"R", b"D", b"S"
# What a worker says, in lines: which version it serves, every `BEAT_S` from when it is ready; or why it ends.
SERVING, FAILED = b"+", b"-"
BEAT_S = 5.0

LAST_S = 0.1  # for the last connections to be made, and for the requests on them to arrive

# What the kernel runs on every segment that comes to a listener: drop those with SYN and without ACK.
# Each is an instruction of the classic packet filter, (opcode, jump if true, jump if false, operand).
SO_ATTACH_FILTER = 26
_NO_SYN = [(0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]


class Server(uvicorn.Server):
    """uvicorn with an app that can reload and drain."""

    def __init__(self, config: uvicorn.Config, app: FastAPI):
        super().__init__(config)
        self._app = app
        self._taking: set[asyncio.Future[Any]] = set()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End when all is answered: also those whom the kernel has let in already, and closing would reset."""
        open_sockets = [listener for server in self.servers for listener in server.sockets]
        listeners = [socket.fromfd(one.fileno(), one.family, one.type) for one in open_sockets]
        for listener in listeners:
            let_nobody_else_in(listener)
        if listeners:
            await asyncio.sleep(LAST_S)
        for server in self.servers:
            server.close()
        for listener in listeners:
            with listener, contextlib.suppress(OSError):
                listener.setblocking(False)
                for _ in range(self.config.backlog):
                    self.take(listener.accept()[0])
        if self._taking:
            await asyncio.sleep(LAST_S)
        await super().shutdown(sockets)

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
            self._reloading = asyncio.ensure_future(runtime.reload())  # kept, or it might vanish before its end

    def drain(self) -> None:
        """Not ready from now on."""
        if runtime := running(self._app):
            runtime.drain()

    def stop(self) -> None:
        """Take no more connections, and end when all requests are answered."""
        self.should_exit = True


class DrainingServer(Server):
    """On SIGTERM: not ready at once, serve on for `drain_s`, then finish what runs and exit with code 0.

    SIGINT skips the wait, and a second signal ends at once. SIGHUP loads the bundle again.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_s: float):
        super().__init__(config, app)
        self._drain_s = drain_s
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if hasattr(signal, "SIGHUP"):  # not on Windows
            self._loop.add_signal_handler(signal.SIGHUP, self.reload)

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
                log.warning("a connection could not be taken: no file descriptor is left")
        elif word == RELOAD:
            self.reload()
        elif word == DRAIN:
            self.drain()
        else:
            self._loop.remove_reader(self._channel)
            self.drain()
            self.stop()


def let_nobody_else_in(listener: socket.socket) -> None:
    """Have the kernel ignore whoever calls from now on, as it may be about to close: closing resets what it let in.

    A connection that is half made is still completed. Who is ignored calls again a second later, and then finds
    nobody, or a successor on the same port. On systems other than Linux nothing changes.
    """
    if sys.platform == "linux":
        program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in _NO_SYN))
        with contextlib.suppress(OSError):  # a kernel without it
            what = struct.pack("HP", len(_NO_SYN), ctypes.addressof(program))
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, what)


def allow_open_files() -> None:
    """Raise the limit on open files, and so on connections, as far as this process may: the usual one is 1024."""
    if sys.platform != "win32":
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # where the system allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def serve(settings: Settings, sessions: list[Session]) -> None:
    """Serve the model of `sessions`, one a device, until a signal comes. Empties the list: a reload frees the model."""
    allow_open_files()
    config, app = _prepare(settings, sessions)
    DrainingServer(config, app, settings.drain_s).run()


def work(settings: Settings, sessions: list[Session], siblings: Siblings, channel: socket.socket) -> None:
    """As `serve`, as the worker of a supervisor at the other end of `channel`."""
    config, app = _prepare(settings, sessions, siblings)
    Worker(config, app, channel).run()


def _prepare(
    settings: Settings, sessions: list[Session], siblings: Siblings | None = None
) -> tuple[uvicorn.Config, FastAPI]:
    logs.configure(settings.log_format)
    if siblings is None or siblings.index == 0:  # the others would say the same
        manifest = sessions[0].bundle.manifest
        log.info("model %s %s, %d classes", manifest.name, manifest.version, len(manifest.classes))
        log.info("device %s, %s", sessions[0].provider, "API key required" if settings.api_key else "no API key")
    app = create_app(settings, *sessions, siblings=siblings)
    sessions.clear()
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=guarded(settings.head_timeout_s),
        ws="none",
        root_path=settings.root_path,
        proxy_headers=False,  # believed as CAMCAL_TRUSTED_PROXIES says, in service.address
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
