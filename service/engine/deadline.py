"""Wait for a result until the deadline of its request."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class DeadlineError(TimeoutError):
    """The request's deadline passed before the model took it."""


async def until(deadline: float, result: Awaitable[T]) -> T:
    """Wait for `result` and cancel it at `deadline`, in the time of `time.monotonic`.

    Raises:
        DeadlineError: at the deadline.
    """
    try:
        async with asyncio.timeout(None if deadline == math.inf else deadline - time.monotonic()):
            return await result
    except TimeoutError:
        raise DeadlineError from None
    finally:
        # A failed future, its exception and this frame in the traceback would form a reference cycle. It would keep all
        # data of the request alive until the next full garbage collection.
        del result


async def in_thread(
    threads: ThreadPoolExecutor,
    work: Callable[[], T],
    *,
    deadline: float = math.inf,
    after: Callable[[], None] = lambda: None,
) -> T:
    """Run `work` in one of `threads`.

    If the caller is cancelled or `deadline` passes first, `work` does not start, or its result is dropped.

    Args:
        threads: the thread pool.
        work: the function to call. Once started it runs to its end, even if the caller no longer waits.
        deadline: end of the wait, in the time of `time.monotonic`.
        after: called in the event loop once `work` has ended or will never start, possibly after this call returned.

    Raises:
        DeadlineError: at the deadline.
    """
    loop = asyncio.get_running_loop()
    pending = [work]  # cleared below: a cancelled item stays in the executor's queue and would keep its data alive

    def start() -> T:
        if time.monotonic() >= deadline:
            raise DeadlineError
        return pending[0]()

    item = threads.submit(start)
    try:
        return await until(deadline, asyncio.wrap_future(item))
    finally:
        pending.clear()
        item.cancel()
        if item.running():
            item.add_done_callback(lambda _: loop.call_soon_threadsafe(after))
        else:
            after()
        del item  # see `until`
