"""Dependencies of routes: the runtime, the time limit of a request, and cancellation when the client disconnects."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from typing import Annotated, TypeVar

from fastapi import Depends, FastAPI, Header, Request

from camcal.service.http.errors import Problem
from camcal.service.http.runtime import Runtime

T = TypeVar("T")

TimeoutMs = Annotated[
    int | None,
    Header(
        alias="X-Request-Timeout-Ms",
        ge=1,
        le=10**9,
        description="Time limit of the request in milliseconds. A request that exceeds it gets a 504.",
    ),
]


def running(app: FastAPI) -> Runtime | None:
    """The runtime of the app; None before its start and after its end."""
    runtime: Runtime | None = getattr(app.state, "runtime", None)
    return runtime


async def get_runtime(request: Request) -> Runtime:
    """The runtime for `request`. Raises Problem 503 if there is none."""
    if runtime := running(request.app):
        return runtime
    raise Problem("not-ready", "the model is not loaded")


Running = Annotated[Runtime, Depends(get_runtime)]


def require_alive(app: FastAPI) -> None:
    """Raises Problem 503 if the model fails on every batch, which a restart may fix."""
    if (runtime := running(app)) and runtime.broken:
        raise Problem("not-ready", runtime.broken)


def require_ready(runtime: Runtime) -> None:
    """Raises Problem 503 while the service drains, and if the model fails on every batch."""
    if runtime.unready:
        raise Problem("not-ready", runtime.unready)


def deadline_of(timeout_ms: int | None) -> float:
    """The time `timeout_ms` from now, on the clock of `time.monotonic`; infinity if it is None."""
    return math.inf if timeout_ms is None else time.monotonic() + timeout_ms / 1000


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects.

    The body of `request` must have been read, so that the next message of the connection is the disconnect.

    Raises:
        Problem: of kind `client-gone`.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    # A cancelled `asyncio.gather` counts as failed, and asyncio logs failures that nobody retrieves.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem("client-gone", "the client disconnected before the response")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        del task, watch  # see `camcal.service.engine.deadline.until`
