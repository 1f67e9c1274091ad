"""Large images: how the service starts the process that decodes them, and how it asks that process.

A kilobyte can hold fifty megapixels. What decoding costs is known from the header (`engine.cost`); where that is more
than a few hundredths of a second, or than a thread's share of memory, the image is decoded by one other process for
all workers, with limits that the system enforces, at the lowest priority. So heavy images wait for each other, and
ordinary ones for none of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial

import numpy as np

from camcal.cpus import yield_to_event_loop
from camcal.models.preprocessing import Preprocessing
from camcal.service.children import command, environment
from camcal.service.engine.admission import QueueFullError
from camcal.service.engine.deadline import until
from camcal.service.engine.decoder import ERRORS, LENGTH
from camcal.service.engine.decoding import Decoded, LargeImageError, Limits, decode
from camcal.service.mailbox import Mailbox

log = logging.getLogger("camcal")

IDLE_S = 60.0  # without an image, after which the process ends and gives its memory back
WAITING = 16  # large images of one process of the service: as many need some seconds
CHUNK_BYTES = 256 * 1024
DEADLINE_S = 3600.0  # where a request has none

# The child of an image that has been decoded gives all of its memory back; its parent should too.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


class DecoderError(RuntimeError):
    """The process that decodes large images ended before its answer."""


class DecoderProcess:
    """Starts the process when the first large image comes, and again when it has ended.

    Args:
        watch: calls a function whenever a file descriptor can be read.
        unwatch: ends that.
    """

    def __init__(self, watch: Callable[[int, Callable[[], None]], object], unwatch: Callable[[int], object]):
        self._watch, self._unwatch = watch, unwatch
        self.mailbox = Mailbox()
        self.mailbox.open()
        self._process: subprocess.Popen[bytes] | None = None
        self._watch(self.mailbox.fileno(), self._start)

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._unwatch(self._pidfd)
            self._process.kill()
            self._process.wait()
            os.close(self._pidfd)
        else:
            self._unwatch(self.mailbox.fileno())
        self.mailbox.close()

    def _start(self) -> None:
        inbox = self.mailbox.fileno()
        self._unwatch(inbox)
        # A session of its own: Ctrl-C on a terminal is for the service, which answers what it has taken.
        self._process = subprocess.Popen(
            command("camcal.service.engine.decoder", str(inbox), str(IDLE_S)),
            pass_fds=[inbox],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment() | _ENVIRONMENT,
        )
        self._pidfd = os.pidfd_open(self._process.pid)
        self._watch(self._pidfd, self._ended)

    def _ended(self) -> None:
        assert self._process is not None
        self._unwatch(self._pidfd)
        os.close(self._pidfd)
        if code := self._process.wait():
            log.error("the decoder of large images ended with code %d", code)
            # If it was an image that ended the process, it would end the next one too.
            self.mailbox.clear()
            self.mailbox.open()
        self._process = None
        self._watch(self.mailbox.fileno(), self._start)


class LargeImages:
    """The large images of one process of the service.

    Args:
        mailbox: of the `DecoderProcess`; None on a system that has none, where a thread decodes without its limits.
        limits: on each image.
        max_waiting_bytes: how many bytes of files may wait; a single file may have more.
    """

    def __init__(self, mailbox: Mailbox | None, limits: Limits, max_waiting_bytes: int):
        self.waiting = self.waiting_bytes = 0
        self._mailbox = mailbox
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="large", initializer=yield_to_event_loop)
        self._limits = limits
        self._max_waiting_bytes = max_waiting_bytes

    async def decode(
        self, image: LargeImageError, preprocessing: Preprocessing, *, picture: bool, deadline: float
    ) -> Decoded:
        """As `camcal.service.engine.decoding.decode`, in the other process.

        Args:
            image: what that function raised.
            preprocessing, picture: as there.
            deadline: in the time of `time.monotonic`; decoding that has begun ends then.

        Raises:
            QueueFullError: if too many large images wait.
            DeadlineError: at the deadline.
            DecoderError: if the other process ended.
            UnsupportedFormatError, ImageTooLargeError, UndecodableImageError, MemoryError: as there.
        """
        nbytes = len(image.data)
        if self.waiting >= WAITING or self.waiting and self.waiting_bytes + nbytes > self._max_waiting_bytes:
            raise _full(self.waiting)
        self.waiting += 1
        self.waiting_bytes += nbytes
        try:
            return await until(deadline, self._decoded(image, preprocessing, picture, deadline))
        finally:
            self.waiting -= 1
            self.waiting_bytes -= nbytes

    def close(self) -> None:
        """End the thread, if there is one."""
        self._thread.shutdown()

    async def _decoded(
        self, image: LargeImageError, preprocessing: Preprocessing, picture: bool, deadline: float
    ) -> Decoded:
        if self._mailbox is None:
            work = partial(decode, image.data, preprocessing, self._limits, picture=picture)
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        request = {
            "preprocessing": preprocessing.model_dump(),
            "limits": asdict(self._limits),
            "picture": picture,
            "nbytes": image.expected.nbytes,
            "timeout_s": min(DEADLINE_S, deadline - time.monotonic()),
        }
        return await self._ask(self._mailbox, json.dumps(request).encode(), image, preprocessing.input_size)

    async def _ask(self, mailbox: Mailbox, request: bytes, image: LargeImageError, side: int) -> Decoded:
        try:
            connection = mailbox.connect()
        except BlockingIOError:
            raise _full(self.waiting) from None
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        try:
            for part in (request, memoryview(image.data)):
                writer.write(len(part).to_bytes(LENGTH))
                for start in range(0, len(part), CHUNK_BYTES):
                    writer.write(part[start : start + CHUNK_BYTES])
                    await writer.drain()
            head = json.loads(await _receive(reader))
            if "error" in head:
                raise ERRORS[head["error"]](head["message"])
            pixels, kept = [await _receive(reader) for _ in range(2)]
        except (EOFError, ConnectionError):
            raise DecoderError("the decoder of large images ended before its answer") from None
        finally:
            writer.transport.abort()  # where nobody waits any more, the image's child is killed
        return Decoded(
            pixels=np.frombuffer(pixels, dtype=np.uint8).reshape(side, side, 3),
            width=head["width"],
            height=head["height"],
            picture=kept,
            picture_size=tuple(head["picture_size"]),
        )


async def _receive(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(LENGTH)))


def _full(waiting: int) -> QueueFullError:
    return QueueFullError(
        f"{waiting} large images are waiting to be decoded, which is as many as may; try again later",
        reason="large_images",
        retry_after_s=max(1, waiting // 2),
    )
