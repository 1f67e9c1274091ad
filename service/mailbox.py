"""Connections between the processes of one service, without an address: only its forks can connect."""

from __future__ import annotations

import asyncio
import mmap
import socket
from collections.abc import Callable

_CALL = b"C"  # a file descriptor is sent along with at least one byte


class Mailbox:
    """Lets one process accept connections from the others.

    Create it before forking the processes that use it. It needs no file, address or permissions: it works on a
    read-only file system, and other users of the machine cannot connect to it.
    """

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        for end in (self._receiver, self._sender):
            end.setblocking(False)
        self._accepting = mmap.mmap(-1, 1)  # shared by the forks: whether one of them accepts connections

    def fileno(self) -> int:
        """Readable when a connection is pending."""
        return self._receiver.fileno()

    def connect(self) -> socket.socket:
        """Open a stream to the accepting process. Raises OSError if there is none or its backlog is full."""
        if not self._accepting[0]:
            raise ConnectionRefusedError("no process accepts connections")
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._sender, [_CALL], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        return ours

    def accept(self) -> socket.socket:
        """The next connection. Raises OSError if none is pending, or if the process has no file descriptor left."""
        _, descriptors, _, _ = socket.recv_fds(self._receiver, len(_CALL), 1)
        if not descriptors:
            raise ConnectionAbortedError("cannot accept a connection: too many open files")
        connection = socket.socket(fileno=descriptors[0])
        connection.setblocking(False)
        return connection

    def serve(self, handle: Callable[[socket.socket], object]) -> Callable[[], None]:
        """Call `handle` with each connection, in the running event loop, until the returned function is called."""
        loop = asyncio.get_running_loop()

        def accept() -> None:
            try:
                connection = self.accept()
            except OSError:  # the client reads the end of the stream
                return
            handle(connection)

        def stop() -> None:
            loop.remove_reader(self._receiver)
            self.clear()

        loop.add_reader(self._receiver, accept)
        self.open()
        return stop

    def open(self) -> None:
        """Accept connections in this process from now on."""
        self._accepting[0] = 1

    def clear(self) -> None:
        """Refuse new and pending connections, after the accepting process has ended."""
        self._accepting[0] = 0
        while True:
            try:
                self.accept().close()
            except BlockingIOError:
                return
            except OSError:  # the descriptor of that connection was lost
                pass

    def close(self) -> None:
        """Close this process's ends."""
        for end in (self._receiver, self._sender):
            end.close()
