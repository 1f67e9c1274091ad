"""Waiting for a result no longer than its request may take."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class DeadlineError(TimeoutError):
    """The request's deadline passed before the model could take it; no work was done."""


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


async def in_thread(
    threads: ThreadPoolExecutor,
    work: Callable[[], T],
    *,
    deadline: float = math.inf,
    after: Callable[[], None] = lambda: None,
) -> T:
    """Run `work` in one of `threads`.

    It is never started, or its result kept, if the caller has been cancelled before or `deadline` has passed.

    Args:
        threads: where.
        work: what to do. Once begun it runs to its end, even if nobody waits for it any more.
        deadline: end of the wait, in the time of `time.monotonic`.
        after: called in the event loop when `work` has ended or will never begin; that may be after this call.

    Raises:
        DeadlineError: at the deadline.
    """
    loop = asyncio.get_running_loop()
    held = [work]  # a cancelled item stays in the executor's queue, with all that it holds

    def begin() -> T:
        if time.monotonic() >= deadline:
            raise DeadlineError
        return held[0]()

    item = threads.submit(begin)
    try:
        return await until(deadline, asyncio.wrap_future(item))
    finally:
        held.clear()
        item.cancel()
        if item.running():
            item.add_done_callback(lambda _: loop.call_soon_threadsafe(after))
        else:
            after()
        del item  # as in `until`
