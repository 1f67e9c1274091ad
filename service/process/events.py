"""The supervisor's event loop. The supervisor forks workers, which is not safe with a running asyncio loop."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable
from typing import Protocol


class HasFileno(Protocol):
    """A socket, for example."""

    def fileno(self) -> int: ...


Source = int | HasFileno


class Events:
    """Calls functions when file descriptors are readable and when timers expire."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def watch(self, source: Source, callback: Callable[[], object]) -> None:
        """Call `callback` whenever `source` is readable."""
        self._selector.register(source, selectors.EVENT_READ, callback)

    def unwatch(self, source: Source) -> None:
        """Stop watching `source`."""
        self._selector.unregister(source)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call `callback` once, after `seconds`."""
        self._timers.append((time.monotonic() + seconds, callback))

    def run_once(self) -> None:
        """Wait for the next event or timer, and call its function."""
        due = min((at for at, _ in self._timers), default=None)
        for key, _ in self._selector.select(None if due is None else max(0.0, due - time.monotonic())):
            key.data()
        now = time.monotonic()
        expired = [timer for timer in self._timers if timer[0] <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for _, callback in expired:
            callback()

    def close(self) -> None:
        """Release the selector."""
        self._selector.close()
