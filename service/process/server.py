"""uvicorn with camcal's app: the common part of a single process and a worker."""

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

LAST_S = 0.1  # time for the last connections and their requests to arrive
RESERVE = 32  # file descriptors reserved for anything but connections: reloads, child processes, files


class Server(uvicorn.Server):
    """A uvicorn server that can reload and drain, and never runs out of file descriptors.

    At the limit on open connections, idle ones are closed, and new ones wait in the kernel.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI):
        super().__init__(config)
        self._app = app
        self._pending: set[asyncio.Future[Any]] = set()
        self._exhausted = RateLimitedWarning(log)
        self._max_connections = _max_connections()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._pending:
            await asyncio.sleep(LAST_S)
        await super().shutdown(sockets)

    def full(self) -> bool:
        """Whether the limit on open connections is reached. If so, log a warning and close idle connections."""
        connections = self.server_state.connections
        if len(connections) + len(self._pending) < self._max_connections:
            return False
        self._exhausted(
            "%d connections are open, the most that the limit on open files allows; new ones wait",
            self._max_connections,
        )
        for connection in list(connections):
            if connection.idle:  # type: ignore[union-attr]  # of camcal.service.http.protocol
                connection.shutdown()
        return True

    def take(self, connection: socket.socket) -> None:
        """Serve an accepted connection."""
        connection.setblocking(False)
        future = asyncio.ensure_future(self._loop.connect_accepted_socket(self._protocol, connection))
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)

    def _protocol(self) -> asyncio.Protocol:
        # As uvicorn does for the connections of its own listeners.
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def reload(self) -> None:
        """Reload the bundle."""
        if runtime := running(self._app):
            # Keep a reference, or the task could be garbage-collected before its end.
            self._reloading = asyncio.ensure_future(runtime.served.reload())

    def drain(self) -> None:
        """Report not ready from now on."""
        if runtime := running(self._app):
            runtime.drain()

    def stop(self) -> None:
        """Accept no more connections, and exit when all requests are finished."""
        self.should_exit = True


def allow_open_files() -> None:
    """Raise the limit on open files, and thus on connections, to the hard limit: the usual soft limit is 1024."""
    if sys.platform != "win32":
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # the system may allow less than the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _max_connections() -> int:
    """Maximum number of open connections of this process."""
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
    """Configure logging and uvicorn, and create the app. Empties `sessions`, so that a reload can free the model."""
    logs.configure(settings.log_format)
    if siblings is None or siblings.index == 0:  # only once per service
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
        proxy_headers=False,  # camcal.service.address handles them, see CAMCAL_TRUSTED_PROXIES
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=math.ceil(settings.answer_s),
    )
    # Exclude all current objects from garbage collection: a full collection would block the event loop for 20 ms.
    gc.collect()
    gc.freeze()
    return config, app
