"""The header with which a client says how long it will wait, and waiting no longer than that."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from typing import Annotated, TypeVar

from fastapi import Header

from camcal.service.batching import DeadlineError

T = TypeVar("T")

TimeoutMs = Annotated[
    int | None,
    Header(
        alias="X-Request-Timeout-Ms",
        ge=1,
        le=10**9,
        description="The client waits this many milliseconds from the request's arrival: 504.",
    ),
]


def latest(wish_ms: int | None) -> float:
    """The moment, in the time of `time.monotonic`, `wish_ms` from now; infinitely late without a wish."""
    return math.inf if wish_ms is None else time.monotonic() + wish_ms / 1000


async def until(deadline: float, result: Awaitable[T]) -> T:
    """Wait for `result`, which is cancelled at `deadline`, in the time of `time.monotonic`.

    Raises:
        DeadlineError: at the deadline.
    """
    try:
        async with asyncio.timeout(None if deadline == math.inf else deadline - time.monotonic()):
            return await result
    except TimeoutError:
        raise DeadlineError from None
    finally:
        # A future that failed, its exception, and this frame in the traceback would keep each other alive, with all
        # that the request holds, until the next full collection.
        del result
