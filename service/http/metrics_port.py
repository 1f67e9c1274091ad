"""`/metrics` on a separate port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.server import ServerState

from camcal.service.http.protocol import guarded
from camcal.service.http.scraping import scrape


@asynccontextmanager
async def metrics_port(app: FastAPI, sockets: Sequence[socket.socket]) -> AsyncIterator[None]:
    """Serve only the metrics of `app` on `sockets`."""
    if not sockets:
        yield
        return

    async def metrics(request: Request) -> Response:
        return await scrape(app.state)

    alone = Starlette(routes=[Route("/metrics", metrics)])
    alone.state = app.state
    config = uvicorn.Config(
        alone,
        http=guarded(app.state.settings.head_timeout_s),
        ws="none",
        lifespan="off",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    config.load()
    state, loop = ServerState(), asyncio.get_running_loop()

    def protocol() -> asyncio.Protocol:  # as uvicorn creates it for its own sockets
        return config.http_protocol_class(config=config, server_state=state, app_state={})  # type: ignore[call-arg]

    servers = [await loop.create_server(protocol, sock=listener) for listener in sockets]
    try:
        yield
    finally:
        for server in servers:
            server.close()
        for connection in list(state.connections):
            connection.shutdown()
