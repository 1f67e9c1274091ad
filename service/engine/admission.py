"""Admission control: limits on waiting requests and on their bytes, and each client's share of both."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

GAPS = 256  # number of departures to measure the rate from
TOGETHER_S = 0.0005  # departures within this time belong to one batch
MAX_RETRY_AFTER_S = 60
PATIENCE = 2.0  # factor on `queue_s` for other clients while one client fills the queue


class QueueFullError(RuntimeError):
    """The queue has no room for the request. `retry_after_s` is when to retry."""

    def __init__(self, message: str, *, reason: str, retry_after_s: int):
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class BodyTooLargeError(ValueError):
    """The body is larger than a client's whole share of the queue."""


class _Client:
    """The requests and bytes of one client."""

    __slots__ = ("depth", "name", "nbytes", "tickets")

    def __init__(self, name: str):
        self.name = name
        self.depth = 0
        self.nbytes = 0
        self.tickets = 0


class Admission:
    """Counts the requests that wait for the model, and the bytes of all request bodies in memory, per client and total.

    A client may hold `share` of an otherwise empty queue, and less while other clients use it. The limit is
    share / (1 - share) times the free room (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory
    packet switches", 1998). A client that fills its share thus leaves room for the next client. When that one arrives,
    the share of the first shrinks and its next requests are rejected.

    Used from one event loop only, so it needs no lock.

    Args:
        queue_limit: maximum number of waiting requests.
        queue_bytes: maximum bytes of request bodies in memory.
        share: maximum share of both per client; 1 turns the shares off.
        queue_s: maximum expected wait of a new request, in seconds.
        patient: `queue_s` applies only when at least this many requests wait.
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
        self._gaps: deque[float] = deque(maxlen=GAPS)  # seconds between departures from a queue that was not empty
        self._left: float | None = None  # time of the last departure, if the queue has not been empty since
        self._follows = False  # whether the departing batch directly followed another, so that the device was busy

    def ticket(self, client: str) -> Ticket:
        """A context manager for one request of `client`; its exit releases everything that the request holds."""
        return Ticket(self, self._clients.get(client) or self._clients.setdefault(client, _Client(client)))

    @contextmanager
    def places(self, client: str, count: int) -> Iterator[list[Ticket]]:
        """`count` tickets of `client`, all waiting for the model. Raises QueueFullError if there is no room for all."""
        with ExitStack() as stack:
            tickets = [stack.enter_context(self.ticket(client)) for _ in range(count)]
            for ticket in tickets:
                ticket.join()
            yield tickets

    def check(self, client: str) -> None:
        """Check before reading a body. Raises QueueFullError if the request would be rejected anyway."""
        entry = self._clients.get(client)
        depth = entry.depth if entry else 0
        if self.depth >= self.patient and (wait_s := self.wait_s()) > self.queue_s * self._patience(depth):
            raise QueueFullError(
                f"{self.depth} requests are waiting, with an expected wait of {wait_s:.1f} s; the limit is "
                f"{self.queue_s:g} s (CAMCAL_QUEUE_S)",
                reason="queue_full",
                retry_after_s=_whole(wait_s),
            )
        self._check_depth(client, depth)

    def check_length(self, nbytes: int) -> None:
        """Raises BodyTooLargeError for a body that does not even fit into an otherwise empty queue."""
        if nbytes > (limit := int(self.queue_bytes * self.share)):
            raise BodyTooLargeError(
                f"the body exceeds {limit} bytes, the limit per client address (CAMCAL_CLIENT_SHARE of "
                "CAMCAL_QUEUE_BYTES, which the workers divide among themselves)"
            )

    def wait_s(self) -> float:
        """Expected seconds until the current queue is served, at the measured rate; 0 before any measurement."""
        return self.depth * sum(self._gaps) / max(len(self._gaps), 1)

    def retry_after_s(self) -> int:
        """The wait in whole seconds, from 1 to 60."""
        return _whole(self.wait_s())

    def _patience(self, depth: int) -> float:
        """The factor on `queue_s` for a client with `depth` requests: above 1 if another client fills the queue."""
        limit = self.share * self.depth
        hogged = depth <= limit and self.share < 1 and any(other.depth > limit for other in self._clients.values())
        return PATIENCE if hogged else 1.0

    def _fits(self, amount: int, free: int) -> bool:
        """Whether a client may hold `amount`, if that leaves `free` of the queue."""
        return self.share >= 1 or amount * (1 - self.share) <= self.share * free

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
                f"{client.nbytes} bytes of images from {client.name} are waiting; the limit per address is "
                f"{self.share:g} of {self.queue_bytes} (CAMCAL_CLIENT_SHARE), and less while other clients wait",
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
                f"{depth} requests from {client} are waiting; the limit per address is {self.share:g} of "
                f"{self.queue_limit} (CAMCAL_CLIENT_SHARE), and less while other clients wait",
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
        # All images of a batch leave at once. Their gaps count only if the gap before the batch counts.
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
    """The bytes of one request and its place in the queue."""

    def __init__(self, admission: Admission, client: _Client):
        self._admission = admission
        self._client = client
        self._nbytes = 0
        self._users = 0
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
        """Reserve `nbytes` more bytes.

        Raises:
            QueueFullError: if all bodies together, or those of this client, would exceed their limit.
            BodyTooLargeError: if this body alone does.
        """
        self.check_length(self._nbytes + nbytes)
        self._admission._reserve(self._client, nbytes)
        self._nbytes += nbytes

    def check_length(self, nbytes: int) -> None:
        """Raises BodyTooLargeError for a body that does not even fit into an otherwise empty queue."""
        self._admission.check_length(nbytes)

    def keep(self) -> Callable[[], None]:
        """Keep the bytes reserved until the returned function is called, even after the ticket's exit."""
        self._users += 1
        return self._drop

    def join(self) -> None:
        """Enter the queue. Raises QueueFullError if the queue, or this client's share of it, is full."""
        self._admission._join(self._client)
        self._waiting = True

    def leave(self) -> None:
        """Leave the queue, when the model takes the request or the request ends. A second call does nothing."""
        if self._waiting:
            self._waiting = False
            self._admission._leave(self._client)

    def _drop(self) -> None:
        self._users -= 1
        if not self._users:
            self._admission._drop(self._client, self._nbytes)


def _whole(wait_s: float) -> int:
    return min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s)))
