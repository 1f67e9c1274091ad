"""Who may come in: the bound on waiting requests and on the bytes they hold."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

GAPS = 256  # departures from which the rate is taken
TOGETHER_S = 0.0005  # departures so close are of one batch
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

    Args:
        queue_limit: how many may wait, whatever they wait for.
        queue_bytes: how many bytes of bodies may be held.
        queue_s: a new request is refused when those before it are expected to take longer than this, in seconds,
        patient: unless fewer than this many wait.
        clock: the time, in seconds.
    """

    def __init__(
        self,
        *,
        queue_limit: int,
        queue_bytes: int,
        queue_s: float = math.inf,
        patient: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.queue_limit = queue_limit
        self.queue_bytes = queue_bytes
        self.queue_s = queue_s
        self.patient = patient
        self.depth = 0
        self.nbytes = 0
        self._clock = clock
        self._gaps: deque[float] = deque(maxlen=GAPS)  # seconds between departures while somebody waited
        self._left: float | None = None  # the last departure, if somebody has waited ever since
        self._follows = False  # whether the batch that leaves now left behind another, for which the device was busy

    def ticket(self) -> Ticket:
        """A request's place, to be used as a context manager: leaving it gives everything back."""
        return Ticket(self)

    def check(self) -> None:
        """To be called before a body is read. Raises QueueFullError when reading it would be in vain."""
        if self.depth >= self.patient and (wait_s := self.wait_s()) > self.queue_s:
            raise QueueFullError(
                f"{self.depth} requests are waiting and will take about {wait_s:.1f} s; the limit is "
                f"{self.queue_s:g} s (CAMCAL_QUEUE_S)",
                reason="queue_full",
                retry_after_s=_whole(wait_s),
            )
        self._check_depth()

    def wait_s(self) -> float:
        """Seconds until today's queue is served, at the rate measured while somebody waited; 0 before any was."""
        return self.depth * sum(self._gaps) / max(len(self._gaps), 1)

    def retry_after_s(self) -> int:
        """Whole seconds until today's queue is served, from 1 to 60."""
        return _whole(self.wait_s())

    def _reserve(self, nbytes: int) -> None:
        if self.nbytes + nbytes > self.queue_bytes:
            raise QueueFullError(
                f"{self.nbytes} bytes of images are waiting; the limit is {self.queue_bytes} (CAMCAL_QUEUE_BYTES)",
                reason="queue_bytes",
                retry_after_s=self.retry_after_s(),
            )
        self.nbytes += nbytes

    def _check_depth(self) -> None:
        if self.depth >= self.queue_limit:
            raise QueueFullError(
                f"{self.depth} requests are waiting; the limit is {self.queue_limit} (CAMCAL_QUEUE_LIMIT)",
                reason="queue_full",
                retry_after_s=self.retry_after_s(),
            )

    def _join(self) -> None:
        self._check_depth()
        self.depth += 1

    def _leave(self) -> None:
        self.depth -= 1
        now = self._clock()
        gap = None if self._left is None else now - self._left
        if gap is None or gap > TOGETHER_S:
            self._follows = gap is not None
        # The rest of a batch leaves at once. That counts only where the time before the batch does.
        if gap is not None and self._follows:
            self._gaps.append(gap)
        self._left = now if self.depth else None


class Ticket:
    """One request's bytes and its place in the queue."""

    def __init__(self, admission: Admission):
        self._admission = admission
        self._nbytes = 0
        self._keepers = 0
        self._waiting = False

    def __enter__(self) -> Ticket:
        self.keep()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        self._drop()

    def reserve(self, nbytes: int) -> None:
        """Hold `nbytes` more. Raises QueueFullError when all bodies together would exceed the limit."""
        self._admission._reserve(nbytes)
        self._nbytes += nbytes

    def keep(self) -> Callable[[], None]:
        """Hold the bytes until what this returns is called, even if the ticket is left before."""
        self._keepers += 1
        return self._drop

    def join(self) -> None:
        """Begin to wait for the model. Raises QueueFullError when the queue is full."""
        self._admission._join()
        self._waiting = True

    def leave(self) -> None:
        """Wait no longer: the model has taken the request, or it is over. A second call does nothing."""
        if self._waiting:
            self._waiting = False
            self._admission._leave()

    def _drop(self) -> None:
        self._keepers -= 1
        if not self._keepers:
            self._admission.nbytes -= self._nbytes


def _whole(wait_s: float) -> int:
    return min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s)))
