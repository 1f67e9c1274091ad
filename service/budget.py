"""A bound on the memory that several threads take at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from service.batching import DeadlineError
from service.deadline import until
from service.decoding import NoRoomError


class Budget:
    """`limit` bytes for all threads together. Whoever needs more than all of it waits to be alone.

    Those who wait are served in order of arrival. The first of them is passed only by those who fit beside it, so that
    it waits no longer for them.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.held = 0
        self._passed = 0  # of the bytes held: of those who came past somebody
        self._waiting: dict[Future[int], int] = {}  # bytes, in order of arrival
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Hold `nbytes` for a while, in any thread.

        Raises:
            NoRoomError: if there is no room at once.
        """
        with self._lock:
            passed = self._take(nbytes, next(iter(self._waiting.values()), 0))
        if passed is None:
            raise NoRoomError(nbytes)
        try:
            yield
        finally:
            self._give(nbytes, passed)

    async def wait(self, nbytes: int, deadline: float) -> Callable[[], None]:
        """Wait for `nbytes`, and hold them until what this returns is called.

        Args:
            nbytes: how much.
            deadline: end of the wait, in the time of `time.monotonic`.

        Raises:
            DeadlineError: if there is no room until then.
        """
        turn: Future[int] = Future()
        turn.set_running_or_notify_cancel()  # so that only `_advance` can end it
        with self._lock:
            self._waiting[turn] = nbytes
            self._advance()
        try:
            return partial(self._give, nbytes, await until(deadline, asyncio.wrap_future(turn)))
        except (DeadlineError, asyncio.CancelledError):
            with self._lock:
                waited = self._waiting.pop(turn, None) is not None
                self._advance()
            if not waited:  # there was room in the same moment
                self._give(nbytes, turn.result())
            raise

    def _take(self, nbytes: int, first: int) -> int | None:
        """Hold `nbytes`, past one who waits for `first` (0: nobody does); how many of them come past it.

        None if there is no room. The lock must be held.
        """
        if self.held and self.held + nbytes > self.limit or first and self._passed + nbytes + first > self.limit:
            return None
        passed = nbytes if first else 0
        self.held += nbytes
        self._passed += passed
        return passed

    def _give(self, nbytes: int, passed: int) -> None:
        with self._lock:
            self.held -= nbytes
            self._passed -= passed
            self._advance()

    def _advance(self) -> None:
        """Serve those who wait and for whom there is room now. The lock must be held."""
        first = 0
        for turn, nbytes in list(self._waiting.items()):
            passed = self._take(nbytes, first)
            if passed is None:
                first = first or nbytes
            else:
                del self._waiting[turn]
                turn.set_result(passed)
