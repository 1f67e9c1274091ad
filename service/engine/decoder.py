"""The decoder process for large images. It decodes one image at a time, in a child process with resource limits.

The workers connect with one end of a socket pair per image (`engine.large`), send the image, and receive the result.
The kernel limits the CPU time and memory of each child. `engine.large.DecoderProcess` starts this program:
python -m camcal.service.engine.decoder DESCRIPTOR SECONDS
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import sys
from typing import Any

from camcal.models.preprocessing import Preprocessing
from camcal.service.engine.decoding import (
    Decoded,
    ImageTooLargeError,
    Limits,
    UndecodableImageError,
    UnsupportedFormatError,
    decode,
)

if sys.platform != "win32":
    import resource

SEND_S = 10.0  # timeout for receiving an image, which the worker has in memory
NICE = 19  # lowest priority: ordinary requests come first
SPARE_BYTES = 64 * 2**20  # address space in addition to the estimated memory
LENGTH = 4  # size of a length prefix in bytes

# Names of errors in a response, and the exceptions that the worker raises for them.
ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (ImageTooLargeError, UndecodableImageError, UnsupportedFormatError, MemoryError)
}


def main(descriptor: int, idle_s: float = math.inf) -> None:
    """Decode images from a `Mailbox`'s descriptor. Returns after `idle_s` without an image, or at end of file."""
    os.nice(NICE)
    with socket.socket(fileno=descriptor) as inbox:
        while select.select([inbox], [], [], None if idle_s == math.inf else idle_s)[0]:
            message, descriptors, _, _ = socket.recv_fds(inbox, 1, 1)
            if not message:  # the service has ended
                return
            with socket.socket(fileno=descriptors[0]) as client, contextlib.suppress(OSError, EOFError):
                client.settimeout(SEND_S)
                _serve(client)


def _serve(client: socket.socket) -> None:
    """Decode one image in a child process. If the child is killed, send the error for it."""
    request = json.loads(_receive(client))
    data = _receive(client)
    child = os.fork()
    if child == 0:
        try:
            _decode(client, request, data)
        finally:
            os._exit(1)
    if not _wait(child, client, request["timeout_s"]):
        os.kill(child, signal.SIGKILL)
    _, status, _ = os.wait4(child, 0)
    if os.WIFSIGNALED(status):
        _send(client, _signal_error(os.WTERMSIG(status), request["limits"]["decode_cpu_s"]))


def _decode(client: socket.socket, request: dict[str, Any], data: bytearray) -> None:
    """In the child: set the limits, decode, and send the result."""
    limits = Limits(**request["limits"])
    cpu_s = math.ceil(limits.decode_cpu_s)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    address_space = _address_space() + request["nbytes"] + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    preprocessing = Preprocessing.model_validate(request["preprocessing"])
    try:
        decoded = decode(data, preprocessing, limits, picture=request["picture"])
    except tuple(ERRORS.values()) as error:
        _send(client, {"error": type(error).__name__, "message": str(error)})
    else:
        _send(client, _describe(decoded), decoded.pixels.tobytes(), decoded.picture)


def _describe(decoded: Decoded) -> dict[str, Any]:
    return {
        "width": decoded.width,
        "height": decoded.height,
        "picture_size": decoded.picture_size,
    }


def _wait(child: int, client: socket.socket, timeout_s: float) -> bool:
    """Wait for the child. Returns False on timeout, or if the client disconnects first."""
    pidfd = os.pidfd_open(child)
    try:
        return pidfd in select.select([pidfd, client.fileno()], [], [], timeout_s)[0]
    finally:
        os.close(pidfd)


def _signal_error(number: int, cpu_s: float) -> dict[str, str]:
    if number == signal.SIGXCPU or number == signal.SIGKILL:
        message = f"decoding the image takes more than {cpu_s:g} s of CPU time (CAMCAL_DECODE_CPU_S)"
        return {"error": ImageTooLargeError.__name__, "message": message}
    message = f"the image is damaged: the decoder was killed by signal {number}"
    return {"error": UndecodableImageError.__name__, "message": message}


def _receive(client: socket.socket) -> bytearray:
    """Receive a length prefix and that many bytes."""
    data = bytearray(int.from_bytes(_exactly(client, bytearray(LENGTH))))
    return _exactly(client, data)


def _exactly(client: socket.socket, data: bytearray) -> bytearray:
    rest = memoryview(data)
    while rest:
        count = client.recv_into(rest)
        if not count:
            raise EOFError
        rest = rest[count:]
    return data


def _send(client: socket.socket, head: dict[str, Any], *parts: bytes) -> None:
    for part in (json.dumps(head).encode(), *parts):
        client.sendall(len(part).to_bytes(LENGTH) + part)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
