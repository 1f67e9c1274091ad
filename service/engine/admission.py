"""Who may come in: the bound on waiting requests and on the bytes they hold, and each client's share of both."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

GAPS = 256  # departures from which the rate is taken
TOGETHER_S = 0.0005  # departures so close are of one batch
MAX_RETRY_AFTER_S = 60
PATIENCE = 2.0  # times `queue_s`, for clients who are not the one that fills the queue


class QueueFullError(RuntimeError):
    """There is no room for one more request; `retry_after_s` says when there should be."""

    def __init__(self, message: str, *, reason: str, retry_after_s: int):
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class BodyTooLargeError(ValueError):
    """A body is larger than what one client may ever hold."""


class _Client:
    """What one client holds."""

    __slots__ = ("depth", "name", "nbytes", "tickets")

    def __init__(self, name: str):
        self.name = name
        self.depth = 0
        self.nbytes = 0
        self.tickets = 0


class Admission:
    """Counts the requests that wait for the model and the bytes of every request body in memory, in all and by client.

    A client may hold `share` of the queue when nobody else holds any of it, and less, the more the others hold: at
    most share / (1 - share) times what is free (Choudhury and Hahne, "Dynamic queue length thresholds for
    shared-memory packet switches", 1998). So a client that fills its share leaves room for the next, and has to give
    up some of it when the next comes: the rest of its bodies is refused.

    Used from one event loop only, so it needs no lock.

    Args:
        queue_limit: how many may wait, whatever they wait for.
        queue_bytes: how many bytes of bodies may be held.
        share: of both, for one client; 1 for all of it.
        queue_s: a new request is refused when those before it are expected to take longer than this, in seconds,
        patient: unless fewer than this many wait.
        clock: the time, in seconds.
    """

    def __init__(
        self,
        *,
        queue_limit: int,
        queue_bytes: int,
        share: float = 1.0,
        queue_s: float = math.inf,
        patient: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.queue_limit = queue_limit
        self.queue_bytes = queue_bytes
        self.share = share
        self.queue_s = queue_s
        self.patient = patient
        self.depth = 0
        self.nbytes = 0
        self._clients: dict[str, _Client] = {}
        self._clock = clock
        self._gaps: deque[float] = deque(maxlen=GAPS)  # seconds between departures while somebody waited
        self._left: float | None = None  # the last departure, if somebody has waited ever since
        self._follows = False  # whether the batch that leaves now left behind another, for which the device was busy

    def ticket(self, client: str) -> Ticket:
        """A place for a request of `client`, to be used as a context manager: leaving it gives everything back."""
        return Ticket(self, self._clients.get(client) or self._clients.setdefault(client, _Client(client)))

    def check(self, client: str) -> None:
        """To be called before a body is read. Raises QueueFullError when reading it would be in vain."""
        found = self._clients.get(client)
        depth = found.depth if found else 0
        if self.depth >= self.patient and (wait_s := self.wait_s()) > self.queue_s * self._patience(depth):
            raise QueueFullError(
                f"{self.depth} requests are waiting and will take about {wait_s:.1f} s; the limit is "
                f"{self.queue_s:g} s (CAMCAL_QUEUE_S)",
                reason="queue_full",
                retry_after_s=_whole(wait_s),
            )
        self._check_depth(client, depth)

    def check_length(self, nbytes: int) -> None:
        """Raises BodyTooLargeError for a body that one client could not hold even if nobody else held anything."""
        if nbytes > (limit := int(self.queue_bytes * self.share)):
            raise BodyTooLargeError(
                f"the body exceeds {limit} bytes, the most that one address may have waiting (CAMCAL_CLIENT_SHARE of "
                "CAMCAL_QUEUE_BYTES, of which each worker has its part)"
            )

    def wait_s(self) -> float:
        """Seconds until today's queue is served, at the rate measured while somebody waited; 0 before any was."""
        return self.depth * sum(self._gaps) / max(len(self._gaps), 1)

    def retry_after_s(self) -> int:
        """Whole seconds until today's queue is served, from 1 to 60."""
        return _whole(self.wait_s())

    def _patience(self, depth: int) -> float:
        """How much of `queue_s` a client with `depth` requests may make of it: more, if another fills the queue."""
        limit = self.share * self.depth
        hogged = depth <= limit and self.share < 1 and any(other.depth > limit for other in self._clients.values())
        return PATIENCE if hogged else 1.0

    def _fits(self, wanted: int, free: int) -> bool:
        """Whether a client may hold `wanted`, of which the newest part is not yet counted out of `free`."""
        return self.share >= 1 or wanted * (1 - self.share) <= self.share * free

    def _reserve(self, client: _Client, nbytes: int) -> None:
        free = self.queue_bytes - self.nbytes - nbytes
        if free < 0:
            raise QueueFullError(
                f"{self.nbytes} bytes of images are waiting; the limit is {self.queue_bytes} (CAMCAL_QUEUE_BYTES)",
                reason="queue_bytes",
                retry_after_s=self.retry_after_s(),
            )
        if not self._fits(client.nbytes + nbytes, free):
            raise QueueFullError(
                f"{client.nbytes} bytes of images from {client.name} are waiting; one address may have "
                f"{self.share:g} of {self.queue_bytes} (CAMCAL_CLIENT_SHARE), or less while others wait",
                reason="client_bytes",
                retry_after_s=self.retry_after_s(),
            )
        self.nbytes += nbytes
        client.nbytes += nbytes

    def _check_depth(self, client: str, depth: int) -> None:
        if self.depth >= self.queue_limit:
            raise QueueFullError(
                f"{self.depth} requests are waiting; the limit is {self.queue_limit} (CAMCAL_QUEUE_LIMIT)",
                reason="queue_full",
                retry_after_s=self.retry_after_s(),
            )
        if depth and not self._fits(depth + 1, self.queue_limit - self.depth - 1):
            raise QueueFullError(
                f"{depth} requests from {client} are waiting; one address may have {self.share:g} of "
                f"{self.queue_limit} (CAMCAL_CLIENT_SHARE), or less while others wait",
                reason="client_full",
                retry_after_s=self.retry_after_s(),
            )

    def _join(self, client: _Client) -> None:
        self._check_depth(client.name, client.depth)
        self.depth += 1
        client.depth += 1

    def _leave(self, client: _Client) -> None:
        self.depth -= 1
        client.depth -= 1
        now = self._clock()
        gap = None if self._left is None else now - self._left
        if gap is None or gap > TOGETHER_S:
            self._follows = gap is not None
        # The rest of a batch leaves at once. That counts only where the time before the batch does.
        if gap is not None and self._follows:
            self._gaps.append(gap)
        self._left = now if self.depth else None

    def _drop(self, client: _Client, nbytes: int) -> None:
        self.nbytes -= nbytes
        client.nbytes -= nbytes
        client.tickets -= 1
        if not client.tickets:
            del self._clients[client.name]


class Ticket:
    """One request's bytes and its place in the queue."""

    def __init__(self, admission: Admission, client: _Client):
        self._admission = admission
        self._client = client
        self._nbytes = 0
        self._keepers = 0
        self._waiting = False
        client.tickets += 1

    def __enter__(self) -> Ticket:
        self.keep()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        self._drop()

    def reserve(self, nbytes: int) -> None:
        """Hold `nbytes` more.

        Raises:
            QueueFullError: when all bodies together, or those of this client, would exceed the limit.
            BodyTooLargeError: when this body alone does.
        """
        self.check_length(self._nbytes + nbytes)
        self._admission._reserve(self._client, nbytes)
        self._nbytes += nbytes

    def check_length(self, nbytes: int) -> None:
        """Raises BodyTooLargeError for a body that this client could not hold even if nobody else held anything."""
        self._admission.check_length(nbytes)

    def keep(self) -> Callable[[], None]:
        """Hold the bytes until what this returns is called, even if the ticket is left before."""
        self._keepers += 1
        return self._drop

    def join(self) -> None:
        """Begin to wait for the model. Raises QueueFullError when the queue, or this client's share of it, is full."""
        self._admission._join(self._client)
        self._waiting = True

    def leave(self) -> None:
        """Wait no longer: the model has taken the request, or it is over. A second call does nothing."""
        if self._waiting:
            self._waiting = False
            self._admission._leave(self._client)

    def _drop(self) -> None:
        self._keepers -= 1
        if not self._keepers:
            self._admission._drop(self._client, self._nbytes)


def _whole(wait_s: float) -> int:
    return min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s)))
