"""The listening sockets: bound before the model is loaded, opened when it is ready."""

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

BACKLOG = 2048  # connections that wait to be accepted; the kernel may lower this
FULL_S = 0.1  # pause before the next accept when no file descriptor was left
MAX_PATH = 107  # maximum length of a Unix socket's path on Linux, in bytes

# A classic packet filter that the kernel runs on each TCP segment for a listener: drop segments with SYN but no ACK.
# Each instruction is (opcode, jump if true, jump if false, operand).
SO_ATTACH_FILTER = 26
_NO_SYN = [(0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]

_PORT = "choose another with --port or CAMCAL_PORT"
_HOST = "choose another with --host or CAMCAL_HOST"
_METRICS = "choose another with CAMCAL_METRICS_PORT"
_UDS = "choose another with --uds or CAMCAL_UDS"


class ListenError(ValueError):
    """The server cannot listen on the address. The message is one sentence."""


class Listeners:
    """The bound sockets of `settings`: one Unix socket, or one socket per address of the host.

    `metrics` has the sockets of CAMCAL_METRICS_PORT.

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
        """The address for clients."""
        return ", ".join(f"unix:{self._path}" if self._path else _url(one) for one in self.sockets)

    def open(self) -> None:
        """Start to listen. Raises ListenError if another process now listens on the address."""
        if self._path and _file(self._path) != self._file:
            raise ListenError(f"another process has replaced {self._path}; {_UDS}")
        for listener in self.sockets:
            try:
                listener.listen(BACKLOG)
            except OSError as error:
                raise _bind_error(self._host, self._port, error) from None

    def stop_accepting(self) -> None:
        """Ignore new clients before the sockets are closed. Connections in the backlog stay."""
        if self._path:
            self._remove()  # unless another server has replaced it
        else:
            for listener in self.sockets:
                stop_accepting(listener)

    def close(self) -> None:
        """Close the sockets, and remove the file of a Unix socket."""
        for listener in (*self.sockets, *self.metrics):
            listener.close()
        self.sockets = []
        self.metrics = []
        self._remove()

    def _remove(self) -> None:
        if self._path and self._file and _file(self._path) == self._file:
            with contextlib.suppress(OSError):  # the folder may have become read-only
                self._path.unlink()


def accept(listener: socket.socket) -> socket.socket | None:
    """The next connection, or None if none is pending.

    Raises:
        OSError: if no file descriptor or memory is left.
    """
    while True:
        try:
            return listener.accept()[0]
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EBADF, errno.EINVAL):
                raise
            # Any other error concerns this connection only: its client has disconnected.


def stop_accepting(listener: socket.socket) -> None:
    """Let the kernel ignore new connections before the listener is closed. Closing would reset waiting connections.

    Half-open connections are still completed. An ignored client retries after one second. By then the port is closed or
    another server listens on it. Does nothing on systems other than Linux.
    """
    if sys.platform == "linux":
        program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *part) for part in _NO_SYN))
        with contextlib.suppress(OSError):  # the kernel may not support it
            option = struct.pack("HP", len(_NO_SYN), ctypes.addressof(program))
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, option)


def _bind_host(host: str, port: int) -> list[socket.socket]:
    """Bind a socket to each address of `host` that this machine has. `::` is one socket for IPv6 and IPv4."""
    listeners: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ListenError(f"unknown host {host}; {_HOST}") from None
    for number, (family, _, _, _, address) in enumerate(addresses, 1):
        bound_port = listeners[0].getsockname()[1] if listeners else port  # with port 0: the same for all addresses
        try:
            listeners.append(_bind(family, (address[0], bound_port, *address[2:]), both=host == "::"))
        except OSError as error:
            # `localhost` may include ::1 on a machine without IPv6.
            absent = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
            if not absent or not (listeners or number < len(addresses)):
                for listener in listeners:
                    listener.close()
                raise _bind_error(host, port, error) from None
    return listeners


def _bind(family: int, address: tuple[object, ...], *, both: bool) -> socket.socket:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.setblocking(False)
        if os.name != "nt":  # on Windows this option would let two processes share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        listener.bind(address)
        stack.pop_all()
        return listener


def _bind_error(host: str, port: int, error: OSError) -> ListenError:
    match error.errno:
        case errno.EADDRINUSE:
            return ListenError(f"port {port} on {host} is already in use; {_PORT}")
        case errno.EACCES:
            return ListenError(f"permission denied for port {port} on {host}; {_PORT}, above 1023")
        case errno.EADDRNOTAVAIL:
            return ListenError(f"host {host} is not an address of this machine; {_HOST}")
        case errno.EAFNOSUPPORT:
            return ListenError(f"host {host} needs IPv6, which this machine does not support; {_HOST}")
    return ListenError(f"cannot listen on port {port} of {host}: {error.strerror}; {_PORT}")


def _bind_path(path: Path) -> socket.socket:
    """Bind a Unix socket, accessible for owner and group. Replaces the socket of a server that was killed."""
    if (size := len(os.fsencode(path))) > MAX_PATH:
        raise ListenError(f"the path {path} has {size} bytes; the limit for a Unix socket is {MAX_PATH}; {_UDS}")
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
        raise ListenError(f"cannot create the Unix socket {path}: {error.strerror}; {_UDS}") from None
    listener.setblocking(False)
    return listener


def _clear(path: Path) -> None:
    """Remove a socket without a listener. Raises ListenError if anything else is at `path`."""
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
    raise ListenError(f"another process already listens on {path}; {_UDS}")


def _file(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file at `path`."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
