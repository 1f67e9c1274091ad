"""The sockets that clients connect to: bound before the model is loaded, open when it is ready."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
import sys
from pathlib import Path

from camcal.service.settings import Settings

BACKLOG = 2048  # connections that wait to be accepted; the kernel has a limit of its own
FULL_S = 0.1  # before connections are accepted again when there was no file descriptor for one
MAX_PATH = 107  # bytes, of a Unix socket on Linux

# What the kernel runs on every segment that comes to a listener: drop those with SYN and without ACK.
# Each is an instruction of the classic packet filter, (opcode, jump if true, jump if false, operand).
SO_ATTACH_FILTER = 26
_NO_SYN = [(0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]

_PORT = "choose another with --port or CAMCAL_PORT"
_HOST = "choose another with --host or CAMCAL_HOST"
_METRICS = "choose another with CAMCAL_METRICS_PORT"
_UDS = "choose another with --uds or CAMCAL_UDS"


class ListenError(ValueError):
    """The address cannot be listened on; the message is one sentence."""


class Listeners:
    """The bound sockets of `settings`: one Unix socket, or one for each address of the host.

    `metrics` has those of CAMCAL_METRICS_PORT.

    Raises:
        ListenError: if the address cannot be bound.
    """

    def __init__(self, settings: Settings):
        self._host, self._port, self._path = settings.host, settings.port, settings.uds
        self.sockets = _bind_host(self._host, self._port) if self._path is None else [_bind_path(self._path)]
        self._file = _file(self._path) if self._path else None
        self.metrics: list[socket.socket] = []
        if settings.metrics_port is not None:
            try:
                self.metrics = _bind_host(self._host, settings.metrics_port)
            except ListenError as error:
                self.close()
                raise ListenError(str(error).replace(_PORT, _METRICS)) from None

    def __enter__(self) -> Listeners:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where clients find the service."""
        return ", ".join(f"unix:{self._path}" if self._path else _url(one) for one in self.sockets)

    def open(self) -> None:
        """Let clients in. Raises ListenError if another service was quicker."""
        if self._path and _file(self._path) != self._file:
            raise ListenError(f"another service has taken {self._path}; {_UDS}")
        for listener in self.sockets:
            try:
                listener.listen(BACKLOG)
            except OSError as error:
                raise _unbound(self._host, self._port, error) from None

    def let_nobody_else_in(self) -> None:
        """Turn new clients away, as the sockets may be about to close; those in the backlog stay."""
        if self._path:
            self._remove()  # or it belongs to a successor
        else:
            for listener in self.sockets:
                let_nobody_else_in(listener)

    def close(self) -> None:
        """Close the sockets, and remove the file of a Unix socket."""
        for listener in (*self.sockets, *self.metrics):
            listener.close()
        self.sockets = []
        self.metrics = []
        self._remove()

    def _remove(self) -> None:
        if self._path and self._file and _file(self._path) == self._file:
            with contextlib.suppress(OSError):  # a folder that became read-only
                self._path.unlink()


def accept(listener: socket.socket) -> socket.socket | None:
    """The next connection, or None if none waits.

    Raises:
        OSError: if there are no file descriptors or no memory for it.
    """
    while True:
        try:
            return listener.accept()[0]
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EBADF, errno.EINVAL):
                raise
            # Anything else concerns that one connection, whose client is gone.


def let_nobody_else_in(listener: socket.socket) -> None:
    """Have the kernel ignore new connections, as the listener may be about to close: closing resets the waiting ones.

    A connection that is half made is still completed. A client that is ignored tries again a second later, and then
    finds nobody, or a successor on the same port. On systems other than Linux nothing changes.
    """
    if sys.platform == "linux":
        program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in _NO_SYN))
        with contextlib.suppress(OSError):  # a kernel without it
            what = struct.pack("HP", len(_NO_SYN), ctypes.addressof(program))
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, what)


def _bind_host(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host` that this machine has; `::` is one for IPv6 and IPv4."""
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ListenError(f"host {host} is not known; {_HOST}") from None
    for number, (family, _, _, _, address) in enumerate(found, 1):
        free = listeners[0].getsockname()[1] if listeners else port  # the same for all, if any will do
        try:
            listeners.append(_bind(family, (address[0], free, *address[2:]), both=host == "::"))
        except OSError as error:
            # Such as ::1, which `localhost` may also mean where there is no IPv6.
            absent = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
            if not absent or not (listeners or number < len(found)):
                for listener in listeners:
                    listener.close()
                raise _unbound(host, port, error) from None
    return listeners


def _bind(family: int, address: tuple[object, ...], *, both: bool) -> socket.socket:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.setblocking(False)
        if os.name != "nt":  # where it would let two services share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        listener.bind(address)
        stack.pop_all()
        return listener


def _unbound(host: str, port: int, error: OSError) -> ListenError:
    """Why `port` of `host` cannot be listened on, and what to do."""
    match error.errno:
        case errno.EADDRINUSE:
            return ListenError(f"port {port} of {host} is in use; {_PORT}")
        case errno.EACCES:
            return ListenError(f"port {port} of {host} needs more privileges; {_PORT}, above 1023")
        case errno.EADDRNOTAVAIL:
            return ListenError(f"host {host} is not an address of this machine; {_HOST}")
        case errno.EAFNOSUPPORT:
            return ListenError(f"host {host} needs IPv6, which this machine does not have; {_HOST}")
    return ListenError(f"port {port} of {host} cannot be used: {error.strerror}; {_PORT}")


def _bind_path(path: Path) -> socket.socket:
    """A Unix socket that its owner and group may connect to, in place of one that a killed service left."""
    if (size := len(os.fsencode(path))) > MAX_PATH:
        raise ListenError(f"{path} has {size} bytes; the path of a socket may have {MAX_PATH}; {_UDS}")
    try:
        _clear(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o117)
        try:
            listener.bind(str(path))
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(before)
    except OSError as error:
        raise ListenError(f"no socket can be made at {path}: {error.strerror}; {_UDS}") from None
    listener.setblocking(False)
    return listener


def _clear(path: Path) -> None:
    """Remove a socket that nobody listens on. Raises ListenError if there is anything else at `path`."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ListenError(f"{path} exists and is not a socket; {_UDS}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return path.unlink()
        except BlockingIOError:  # its backlog is full
            pass
    raise ListenError(f"another service listens on {path}; {_UDS}")


def _file(path: Path) -> tuple[int, int] | None:
    """Which file is at `path`."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
