"""The process that decodes large images: one for the whole service, one image at a time, each in a child with limits.

The service's processes send it one end of a socket pair for each image (`engine.large`), on which the image comes and
the answer goes. A child that takes too much memory or CPU time is killed, and nothing of it remains. Run by
`engine.large.DecoderProcess`: python -m camcal.service.engine.decoder DESCRIPTOR SECONDS
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

SEND_S = 10.0  # for the service's process to send an image that it has in memory
NICE = 19  # ordinary requests come first
SPARE_BYTES = 64 * 2**20  # of address space beside what decoding should take
LENGTH = 4  # bytes of a length

# An error's name on the wire → what the service raises.
ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (ImageTooLargeError, UndecodableImageError, UnsupportedFormatError, MemoryError)
}


def main(descriptor: int, idle_s: float = math.inf) -> None:
    """Decode what comes through a `Mailbox`'s descriptor, until nothing has come for `idle_s` or can come any more."""
    os.nice(NICE)
    with socket.socket(fileno=descriptor) as inbox:
        while select.select([inbox], [], [], None if idle_s == math.inf else idle_s)[0]:
            message, descriptors, _, _ = socket.recv_fds(inbox, 1, 1)
            if not message:  # the service is gone
                return
            with socket.socket(fileno=descriptors[0]) as client, contextlib.suppress(OSError, EOFError):
                client.settimeout(SEND_S)
                _serve(client)


def _serve(client: socket.socket) -> None:
    """Decode one image in a child, and send a failure in its place if it is killed."""
    request = json.loads(_receive(client))
    data = _receive(client)
    child = os.fork()
    if child == 0:
        try:
            _decode(client, request, data)
        finally:
            os._exit(1)
    if not _ends(child, client, request["timeout_s"]):
        os.kill(child, signal.SIGKILL)
    _, status, _ = os.wait4(child, 0)
    if os.WIFSIGNALED(status):
        _send(client, _fate(os.WTERMSIG(status), request["limits"]["decode_cpu_s"]))


def _decode(client: socket.socket, request: dict[str, Any], data: bytearray) -> None:
    """In the child: decode within limits, and answer."""
    limits = Limits(**request["limits"])
    cpu_s = math.ceil(limits.decode_cpu_s)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    most = _address_space() + request["nbytes"] + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    preprocessing = Preprocessing.model_validate(request["preprocessing"])
    try:
        decoded = decode(data, preprocessing, limits, picture=request["picture"])
    except tuple(ERRORS.values()) as error:
        _send(client, {"error": type(error).__name__, "message": str(error)})
    else:
        _send(client, _described(decoded), decoded.pixels.tobytes(), decoded.picture)


def _described(decoded: Decoded) -> dict[str, Any]:
    return {
        "width": decoded.width,
        "height": decoded.height,
        "picture_size": decoded.picture_size,
        "peak_bytes": _peak(),
    }


def _ends(child: int, client: socket.socket, timeout_s: float) -> bool:
    """Whether the child ends before its time is over, and before its client is gone."""
    ended = os.pidfd_open(child)
    try:
        return ended in select.select([ended, client.fileno()], [], [], timeout_s)[0]
    finally:
        os.close(ended)


def _fate(number: int, cpu_s: float) -> dict[str, str]:
    if number == signal.SIGXCPU or number == signal.SIGKILL:
        message = f"decoding the image takes more than {cpu_s:g} s of CPU time (CAMCAL_DECODE_CPU_S)"
        return {"error": ImageTooLargeError.__name__, "message": message}
    message = f"the image is damaged: its decoder ended by signal {number}"
    return {"error": UndecodableImageError.__name__, "message": message}


def _receive(client: socket.socket) -> bytearray:
    """A length and as many bytes."""
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


def _peak() -> int:
    """Bytes of memory at the height of this process's life."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
