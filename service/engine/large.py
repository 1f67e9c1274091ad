"""Large images: start the separate process that decodes them, and send it images.

A file of a few kilobytes can contain fifty megapixels. The cost to decode an image is estimated from its header
(`engine.cost`). An image is large if the cost exceeds a few hundredths of a second, or a thread's share of the memory.
A separate process decodes large images, with resource limits and at the lowest priority. All workers share that
process. Large images thus wait for each other, and ordinary images never wait for large ones.
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

IDLE_S = 60.0  # time without an image after which the decoder process exits and frees its memory
WAITING = 16  # maximum number of waiting large images per worker; they take some seconds
CHUNK_BYTES = 256 * 1024
DEADLINE_S = 3600.0  # for requests without a deadline

# A child frees all memory when it exits. These settings make its parent free memory too.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


class DecoderError(RuntimeError):
    """The decoder process ended before it responded."""


class DecoderProcess:
    """Starts the decoder process for the first large image, and again after it has ended.

    Args:
        watch: registers a function that is called whenever a file descriptor is readable.
        unwatch: removes the registration.
    """

    def __init__(self, watch: Callable[[int, Callable[[], None]], object], unwatch: Callable[[int], object]):
        self._watch, self._unwatch = watch, unwatch
        self.mailbox = Mailbox()
        self.mailbox.open()
        self._process: subprocess.Popen[bytes] | None = None
        self._watch(self.mailbox.fileno(), self._start)

    @property
    def pid(self) -> int | None:
        """The process id, or None while the process is not running."""
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
        # In a new session: on Ctrl-C only the server gets the signal, and finishes its requests.
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
            log.error("the decoder process for large images exited with code %d", code)
            # A waiting image may have crashed the process, and would crash the next one too.
            self.mailbox.clear()
            self.mailbox.open()
        self._process = None
        self._watch(self.mailbox.fileno(), self._start)


class LargeImages:
    """Sends the large images of one worker to the decoder process.

    Args:
        mailbox: the mailbox of the `DecoderProcess`. None decodes in a thread, without resource limits; used on systems
            other than Linux.
        limits: limits for each image.
        max_waiting_bytes: maximum bytes of waiting files; a single file may be larger.
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
        """Like `camcal.service.engine.decoding.decode`, but in the decoder process.

        Args:
            image: the exception that `decode` raised.
            preprocessing, picture: see `decode`.
            deadline: in the time of `time.monotonic`; decoding is stopped then.

        Raises:
            QueueFullError: if too many large images are waiting.
            DeadlineError: at the deadline.
            DecoderError: if the decoder process ended.
            UnsupportedFormatError, ImageTooLargeError, UndecodableImageError, MemoryError: see `decode`.
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
        """End the decoding thread, if any."""
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
        return await self._request(self._mailbox, json.dumps(request).encode(), image, preprocessing.input_size)

    async def _request(self, mailbox: Mailbox, request: bytes, image: LargeImageError, side: int) -> Decoded:
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
            pixels, jpeg = [await _receive(reader) for _ in range(2)]
        except (EOFError, ConnectionError):
            raise DecoderError("the decoder process for large images ended before it responded") from None
        finally:
            writer.transport.abort()  # if this task was cancelled, the decoder kills the image's child
        return Decoded(
            pixels=np.frombuffer(pixels, dtype=np.uint8).reshape(side, side, 3),
            width=head["width"],
            height=head["height"],
            picture=jpeg,
            picture_size=tuple(head["picture_size"]),
        )


async def _receive(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(LENGTH)))


def _full(waiting: int) -> QueueFullError:
    return QueueFullError(
        f"too many large images: {waiting} are waiting to be decoded; retry later",
        reason="large_images",
        retry_after_s=max(1, waiting // 2),
    )
