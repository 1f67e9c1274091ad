"""Run work in a thread that never delays process exit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def in_background(work: Callable[[], T]) -> T:
    """Call `work` in a daemon thread and return its result.

    With `asyncio.to_thread`, both the event loop and the interpreter would wait for the thread at shutdown.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    future.set_running_or_notify_cancel()
    threading.Thread(target=run, name="background", daemon=True).start()
    return await asyncio.wrap_future(future)
