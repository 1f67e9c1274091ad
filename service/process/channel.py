"""The channel between the supervisor and a worker, a socket pair.

The supervisor sends commands of one byte; `CONNECTION` comes with the connection's file descriptor. A worker sends
lines: `SERVING` with its model version, every `BEAT_S` while it is ready, or `FAILED` with the reason why it ends.
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
    """The supervisor's state of a worker.

    served: whether it has ever been ready. version: its model version while it is ready. missed_beats: heartbeats
    missed in a row. reason: why it ends.
    """

    index: int
    process: BaseProcess
    channel: socket.socket
    open: bool = True
    served: bool = False
    version: str | None = None
    missed_beats: int = 0
    reason: str | None = None
    _partial: bytes = field(default=b"", repr=False)  # an incomplete line

    def receive(self) -> list[bytes]:
        """Read the available lines. Sets `open` to False at end of file."""
        try:
            received = self.channel.recv(4096)
        except OSError:
            received = b""
        self.open = bool(received)
        *lines, self._partial = (self._partial + received).split(b"\n")
        return lines

    def send(self, command: bytes) -> None:
        """Send `command`. Does nothing if the worker has ended."""
        with contextlib.suppress(OSError):
            self.channel.send(command)

    def send_connection(self, connection: socket.socket) -> bool:
        """Pass `connection` to the worker. Returns False if the worker has ended."""
        try:
            socket.send_fds(self.channel, [CONNECTION], [connection.fileno()])
        except OSError:
            return False
        return True
