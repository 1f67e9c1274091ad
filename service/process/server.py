"""uvicorn with camcal's app: the part that a single process and a worker have in common."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import socket
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI

from camcal.service import logs
from camcal.service.engine.session import Session
from camcal.service.http.app import create_app
from camcal.service.http.dependencies import running
from camcal.service.http.protocol import guarded
from camcal.service.http.siblings import Siblings
from camcal.service.logs import RateLimitedWarning
from camcal.service.mailbox import Mailbox
from camcal.service.settings import Settings

if sys.platform != "win32":
    import resource

log = logging.getLogger("camcal")

LAST_S = 0.1  # for the last connections to be made, and for the requests on them to arrive
RESERVE = 32  # file descriptors for everything but connections: reloading, other processes, files


class Server(uvicorn.Server):
    """uvicorn with an app that can reload and drain, and which never runs out of file descriptors.

    When as many connections are open as may be, those that wait for a next request are closed; new ones wait in the
    kernel meanwhile.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI):
        super().__init__(config)
        self._app = app
        self._taking: set[asyncio.Future[Any]] = set()
        self._exhausted = RateLimitedWarning(log)
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


def prepare(
    settings: Settings,
    sessions: list[Session],
    metrics: list[socket.socket],
    siblings: Siblings | None = None,
    decoder: Mailbox | None = None,
) -> tuple[uvicorn.Config, FastAPI]:
    """Configure logs and uvicorn, and create the app. Empties `sessions`: a reload frees the model."""
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
