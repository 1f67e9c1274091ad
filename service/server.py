"""Runs the app under uvicorn, and drains it in the way that orchestrators expect."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service import logs
from service.app import create_app
from service.protocol import guarded
from service.runtime import running
from service.session import Session
from service.settings import Settings

log = logging.getLogger("camcal")


class DrainingServer(uvicorn.Server):
    """On SIGTERM: not ready at once, serve on for `drain_s`, then finish what runs and exit with code 0.

    SIGINT skips the wait, and a second signal ends at once. SIGHUP loads the bundle again.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_s: float):
        super().__init__(config)
        self._app = app
        self._drain_s = drain_s
        self._signals = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if hasattr(signal, "SIGHUP"):  # not on Windows
            self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        await super().serve(sockets)

    def _reload(self) -> None:
        if runtime := running(self._app):
            self._reloading = asyncio.ensure_future(runtime.reload())  # kept, or it might vanish before its end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._drain, self._drain_s if sig == signal.SIGTERM else 0.0)

    def _drain(self, drain_s: float) -> None:
        log.info("draining: not ready, serving for %g s more", drain_s)
        if runtime := running(self._app):
            runtime.drain()
        self._loop.call_later(drain_s, self._stop)

    def _stop(self) -> None:
        self.should_exit = True


def serve(settings: Settings, sessions: list[Session]) -> None:
    """Serve the model of `sessions`, one a device, until a signal comes. Empties the list: a reload frees the model."""
    logs.configure(settings.log_format)
    manifest = sessions[0].bundle.manifest
    log.info("model %s %s, %d classes", manifest.name, manifest.version, len(manifest.classes))
    log.info("device %s, %s", sessions[0].provider, "API key required" if settings.api_key else "no API key")
    app = create_app(settings, *sessions)
    sessions.clear()
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=guarded(settings.head_timeout_s),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=math.ceil(settings.timeout_s) + 5,
    )
    # What is loaded now stays: a full collection that walks it all would hold the event loop for 20 ms.
    gc.collect()
    gc.freeze()
    DrainingServer(config, app, settings.drain_s).run()
