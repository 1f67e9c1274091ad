"""Connections between the processes of one service, without an address: only those that inherit it can connect."""

from __future__ import annotations

import asyncio
import mmap
import socket
from collections.abc import Callable

_CALL = b"C"  # what carries the file descriptor


class Mailbox:
    """Where one process takes the connections of others.

    It is made before the processes that use it are forked. It needs no file, no address and no permissions: it works on
    a read-only file system, and other users of the machine cannot reach it.
    """

    def __init__(self) -> None:
        self._takes, self._gives = socket.socketpair()
        for end in (self._takes, self._gives):
            end.setblocking(False)
        self._taken = mmap.mmap(-1, 1)  # shared by the forked processes: whether one of them takes connections

    def fileno(self) -> int:
        """Readable when a connection waits."""
        return self._takes.fileno()

    def connect(self) -> socket.socket:
        """A stream to the process that takes connections. Raises OSError if there is none, or no room."""
        if not self._taken[0]:
            raise ConnectionRefusedError("the process that takes connections is not there")
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._gives, [_CALL], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        return ours

    def take(self) -> socket.socket:
        """The next connection. Raises OSError if none waits, or if no file descriptor is left for it."""
        _, descriptors, _, _ = socket.recv_fds(self._takes, len(_CALL), 1)
        if not descriptors:
            raise ConnectionAbortedError("a connection could not be taken: no file descriptor is left")
        connection = socket.socket(fileno=descriptors[0])
        connection.setblocking(False)
        return connection

    def serve(self, answer: Callable[[socket.socket], object]) -> Callable[[], None]:
        """Call `answer` with each connection, in the running event loop, until the returned function is called."""
        loop = asyncio.get_running_loop()

        def take() -> None:
            try:
                connection = self.take()
            except OSError:  # its client sees the end of the stream
                return
            answer(connection)

        def stop() -> None:
            loop.remove_reader(self._takes)
            self.clear()

        loop.add_reader(self._takes, take)
        self.open()
        return stop

    def open(self) -> None:
        """Let others connect from now on: this process takes their connections."""
        self._taken[0] = 1

    def clear(self) -> None:
        """Refuse connections, those that wait too: the process that took them is gone."""
        self._taken[0] = 0
        while True:
            try:
                self.take().close()
            except BlockingIOError:
                return
            except OSError:  # ended without a descriptor
                pass

    def close(self) -> None:
        """Close this process's ends."""
        for end in (self._takes, self._gives):
            end.close()
