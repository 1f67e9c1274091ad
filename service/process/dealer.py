"""Accepts connections and distributes them to the workers in turn."""

from __future__ import annotations

import itertools
import logging
import select
import socket
from collections.abc import Callable, Iterable
from functools import partial

from camcal.service.logs import RateLimitedWarning
from camcal.service.process.channel import WorkerHandle
from camcal.service.process.events import Events
from camcal.service.process.listening import FULL_S, Listeners, accept

log = logging.getLogger("camcal")

BUSY_S = 0.01  # pause before the next attempt when no worker can take a connection


class Dealer:
    """Distributes the connections of a service with several workers. They wait in the kernel while no worker is free.

    Args:
        listeners: the listening sockets.
        events: the supervisor's event loop.
        workers: returns all workers; those with a version take connections.
    """

    def __init__(self, listeners: Listeners, events: Events, workers: Callable[[], Iterable[WorkerHandle]]):
        self._listeners = listeners
        self._events = events
        self._workers = workers
        self._turns = itertools.count()
        self._accepting = False
        self._exhausted = RateLimitedWarning(log)

    def update(self) -> None:
        """Accept connections if a worker is ready."""
        if self._listeners.sockets:
            self._accept(any(worker.version for worker in self._workers()))

    def stop(self) -> None:
        """Accept no more connections."""
        self._accept(False)

    def deal_waiting(self) -> bool:
        """Distribute the connections that wait in the kernel. Returns False if some are left that a worker may take."""
        for listener in self._listeners.sockets:
            while self._deal(listener):
                pass
        return not (self._connections_wait() and any(worker.version for worker in self._workers()))

    def _accept(self, enabled: bool) -> None:
        if enabled != self._accepting:
            self._accepting = enabled
            for listener in self._listeners.sockets:
                if enabled:
                    self._events.watch(listener, partial(self._deal, listener))
                else:
                    self._events.unwatch(listener)

    def _deal(self, listener: socket.socket) -> bool:
        """Pass the next connection to the next worker. Returns False if there is no connection or no free worker."""
        workers = self._free_workers()
        if not workers:
            self._pause(BUSY_S)
            return False
        try:
            connection = accept(listener)
        except OSError as error:
            self._exhausted("cannot accept connections: %s", error.strerror)
            self._pause(FULL_S)
            return False
        if connection is None:
            return False
        with connection:
            any(worker.send_connection(connection) for worker in workers)
        return True

    def _pause(self, seconds: float) -> None:
        if self._accepting:
            self._accept(False)
            self._events.later(seconds, self.update)

    def _free_workers(self) -> list[WorkerHandle]:
        """The workers that can take a connection, starting with the one whose turn it is.

        A channel counts as writable only while enough of its buffer is free, so there is always room for commands.
        """
        ready = {worker.channel.fileno(): worker for worker in self._workers() if worker.version}
        poll = select.poll()
        for channel in ready:
            poll.register(channel, select.POLLOUT)
        free = [ready[channel] for channel, event in sorted(poll.poll(0)) if event == select.POLLOUT]
        first = next(self._turns) % max(1, len(free))
        return free[first:] + free[:first]

    def _connections_wait(self) -> bool:
        poll = select.poll()
        for listener in self._listeners.sockets:
            poll.register(listener, select.POLLIN)
        return bool(poll.poll(0))
