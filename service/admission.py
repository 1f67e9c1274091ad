"""Who may come in: the bound on waiting requests and on the bytes they hold."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

RATE_WINDOW_S = 10.0
MAX_RETRY_AFTER_S = 60


class QueueFullError(RuntimeError):
    """There is no room for one more request; `retry_after_s` says when there should be."""

    def __init__(self, message: str, *, reason: str, retry_after_s: int):
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Admission:
    """Counts the requests that wait for the model and the bytes of every request body in memory.

    Used from one event loop only, so it needs no lock.
    """

    def __init__(self, *, queue_limit: int, queue_bytes: int, clock: Callable[[], float] = time.monotonic):
        self.queue_limit = queue_limit
        self.queue_bytes = queue_bytes
        self.depth = 0
        self.nbytes = 0
        self._clock = clock
        self._left: deque[float] = deque(maxlen=64)  # when the latest requests left the queue

    def ticket(self) -> Ticket:
        """A request's place, to be used as a context manager: leaving it gives everything back."""
        return Ticket(self)

    def retry_after_s(self) -> int:
        """Whole seconds until today's queue is served at the rate of the last seconds, from 1 to 60."""
        now = self._clock()
        recent = [left for left in self._left if now - left <= RATE_WINDOW_S]
        if len(recent) < 2:
            return 1
        rate = len(recent) / max(now - recent[0], 1e-3)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self.depth / rate)))

    def _reserve(self, nbytes: int) -> None:
        if self.nbytes + nbytes > self.queue_bytes:
            raise QueueFullError(
                f"{self.nbytes} bytes of images are waiting; the limit is {self.queue_bytes} (CAMCAL_QUEUE_BYTES)",
                reason="queue_bytes",
                retry_after_s=self.retry_after_s(),
            )
        self.nbytes += nbytes

    def _join(self) -> None:
        if self.depth >= self.queue_limit:
            raise QueueFullError(
                f"{self.depth} requests are waiting; the limit is {self.queue_limit} (CAMCAL_QUEUE_LIMIT)",
                reason="queue_full",
                retry_after_s=self.retry_after_s(),
            )
        self.depth += 1

    def _leave(self) -> None:
        self.depth -= 1
        self._left.append(self._clock())


class Ticket:
    """One request's bytes and its place in the queue."""

    def __init__(self, admission: Admission):
        self._admission = admission
        self._nbytes = 0
        self._waiting = False

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        self._admission.nbytes -= self._nbytes

    def reserve(self, nbytes: int) -> None:
        """Hold `nbytes` more. Raises QueueFullError when all bodies together would exceed the limit."""
        self._admission._reserve(nbytes)
        self._nbytes += nbytes

    def join(self) -> None:
        """Begin to wait for the model. Raises QueueFullError when the queue is full."""
        self._admission._join()
        self._waiting = True

    def leave(self) -> None:
        """Wait no longer: the model has taken the request, or it is over. A second call does nothing."""
        if self._waiting:
            self._waiting = False
            self._admission._leave()
