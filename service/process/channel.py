"""The channel between a supervisor and each of its workers, a pair of sockets.

The supervisor sends single bytes, `CONNECTION` together with the connection's file descriptor. A worker sends lines:
`SERVING` with its model's version every `BEAT_S` from when it is ready, or `FAILED` with the reason why it ends.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

CONNECTION, RELOAD, SPREAD, DRAIN, STOP = b"C", b"R", b"K", b"D", b"S"
SERVING, FAILED = b"+", b"-"
BEAT_S = 5.0


@dataclass(eq=False, kw_only=True)
class WorkerHandle:
    """A worker as its supervisor sees it.

    served: whether it was ever ready. version: of the model that it serves, as long as it is ready. silent: beats that
    it has missed. reason: why it ends.
    """

    index: int
    process: BaseProcess
    channel: socket.socket
    open: bool = True
    served: bool = False
    version: str | None = None
    silent: int = 0
    reason: str | None = None
    _partial: bytes = field(default=b"", repr=False)  # of a line that is not complete

    def receive(self) -> list[bytes]:
        """The lines that have come; `open` is false after the last."""
        try:
            received = self.channel.recv(4096)
        except OSError:
            received = b""
        self.open = bool(received)
        *lines, self._partial = (self._partial + received).split(b"\n")
        return lines

    def send(self, word: bytes) -> None:
        """Send `word`, unless the worker is ending."""
        with contextlib.suppress(OSError):
            self.channel.send(word)

    def send_connection(self, connection: socket.socket) -> bool:
        """Hand over `connection`; False if the worker is ending."""
        try:
            socket.send_fds(self.channel, [CONNECTION], [connection.fileno()])
        except OSError:
            return False
        return True
