"""What routes depend on: the runtime, the time a client waits, and whether it is still there."""

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
    """The app's runtime, or None before its start and after its end."""
    runtime: Runtime | None = getattr(app.state, "runtime", None)
    return runtime


async def get_runtime(request: Request) -> Runtime:
    """The runtime that answers `request`. Raises Problem 503 when there is none."""
    if runtime := running(request.app):
        return runtime
    raise Problem("not-ready", "the model is not loaded")


Running = Annotated[Runtime, Depends(get_runtime)]


def require_alive(app: FastAPI) -> None:
    """Raises Problem 503 when the model fails on every batch, which a restart may mend."""
    if (runtime := running(app)) and runtime.broken:
        raise Problem("not-ready", runtime.broken)


def require_ready(runtime: Runtime) -> None:
    """Raises Problem 503 while the service drains, and when the model fails on every batch."""
    if runtime.unready:
        raise Problem("not-ready", runtime.unready)


def latest(wish_ms: int | None) -> float:
    """The moment, in the time of `time.monotonic`, `wish_ms` from now; infinitely late without a wish."""
    return math.inf if wish_ms is None else time.monotonic() + wish_ms / 1000


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client has left.

    The body of `request` must have been read: the next message of its connection is then the client's leaving.

    Raises:
        Problem: of kind `client-gone`.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    # What `asyncio.gather` gives counts as failed once it is cancelled, and a failure nobody looks at is logged.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem("client-gone", "the client left before its answer")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        del task, watch  # see `camcal.service.engine.deadline.until`
