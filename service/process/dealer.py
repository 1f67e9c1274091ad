"""Accepts connections and deals them out to the workers in turn."""

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

BEHIND_S = 0.01  # before connections are accepted again when no worker had room for one


class Dealer:
    """The connections of a service with several workers. While nobody can take one, they wait in the kernel.

    Args:
        listeners: where connections come in.
        events: the supervisor's loop.
        workers: all of them; those with a version take connections.
    """

    def __init__(self, listeners: Listeners, events: Events, workers: Callable[[], Iterable[WorkerHandle]]):
        self._listeners = listeners
        self._events = events
        self._workers = workers
        self._turns = itertools.count()
        self._accepting = False
        self._exhausted = RateLimitedWarning(log)

    def update(self) -> None:
        """Accept connections if a worker can take them."""
        if self._listeners.sockets:
            self._accept(any(worker.version for worker in self._workers()))

    def stop(self) -> None:
        """Accept no more."""
        self._accept(False)

    def deal_waiting(self) -> bool:
        """Deal out what the kernel has accepted; False if connections are left that a worker could take later."""
        for listener in self._listeners.sockets:
            while self._deal(listener):
                pass
        return not (self._connections_wait() and any(worker.version for worker in self._workers()))

    def _accept(self, wanted: bool) -> None:
        if wanted != self._accepting:
            self._accepting = wanted
            for listener in self._listeners.sockets:
                if wanted:
                    self._events.watch(listener, partial(self._deal, listener))
                else:
                    self._events.unwatch(listener)

    def _deal(self, listener: socket.socket) -> bool:
        """Give the next connection to the next worker; False if there was none, or nobody to take it."""
        takers = self._takers()
        if not takers:
            self._pause(BEHIND_S)
            return False
        try:
            connection = accept(listener)
        except OSError as error:
            self._exhausted("connections wait: %s", error.strerror)
            self._pause(FULL_S)
            return False
        if connection is None:
            return False
        with connection:
            any(worker.send_connection(connection) for worker in takers)
        return True

    def _pause(self, seconds: float) -> None:
        if self._accepting:
            self._accept(False)
            self._events.later(seconds, self.update)

    def _takers(self) -> list[WorkerHandle]:
        """The workers that can take a connection, first the one whose turn it is.

        A channel is writable while no more than a part of it is in use, so words always find room.
        """
        ready = {worker.channel.fileno(): worker for worker in self._workers() if worker.version}
        poll = select.poll()
        for channel in ready:
            poll.register(channel, select.POLLOUT)
        takers = [ready[channel] for channel, event in sorted(poll.poll(0)) if event == select.POLLOUT]
        first = next(self._turns) % max(1, len(takers))
        return takers[first:] + takers[:first]

    def _connections_wait(self) -> bool:
        poll = select.poll()
        for listener in self._listeners.sockets:
            poll.register(listener, select.POLLIN)
        return bool(poll.poll(0))
