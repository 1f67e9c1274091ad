"""Work-conserving batches: an idle device starts at once, a batch grows only while the device is busy."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.session import Outputs

log = logging.getLogger("camcal")

Run = Callable[[NDArray[np.uint8], int], Outputs]


class DeadlineError(TimeoutError):
    """The request's deadline passed before the model could take it; no work was done."""


class ClosedError(RuntimeError):
    """The batcher takes no more images."""


class InferenceError(RuntimeError):
    """The model failed on the batch that held this image."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One image's row in the outputs of the batch that carried it."""

    outputs: Outputs
    row: int
    queue_s: float
    inference_s: float


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """One finished run of the model: how many images, and how long it took."""

    size: int
    inference_s: float


@dataclass(eq=False, kw_only=True)
class _Entry:
    image: NDArray[np.uint8]
    top_k: int
    future: asyncio.Future[Answer]
    on_dispatch: Callable[[], None]
    arrived: float
    timer: asyncio.TimerHandle | None = None


class Batcher:
    """Feeds `run` from one thread with batches of the images that wait.

    Lives in one event loop. An image leaves the queue by being dispatched, by its deadline, or because its caller
    was cancelled; the last two cost the device nothing.

    Args:
        run: takes images (uint8, N×H×W×3) and top_k, the largest that an image of the batch asks for.
        max_batch: the most images in one run.
        on_batch: told of every finished run.
    """

    def __init__(self, run: Run, *, max_batch: int, on_batch: Callable[[BatchReport], None] = lambda report: None):
        self._run = run
        self._max_batch = max_batch
        self._on_batch = on_batch
        self._waiting: dict[_Entry, None] = {}  # in order of arrival
        self._busy = False
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")

    async def submit(
        self,
        image: NDArray[np.uint8],
        top_k: int,
        *,
        deadline: float | None = None,
        on_dispatch: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Wait for the model's answer on one image.

        Args:
            image: uint8, H×W×3.
            top_k: how many maps are needed at least.
            deadline: latest dispatch, in the time of `time.monotonic`.
            on_dispatch: called when the image leaves the queue for the device.

        Raises:
            DeadlineError: if the deadline passes before dispatch.
            ClosedError: after `close`.
            InferenceError: if the model fails on the batch.
        """
        if self._closed:
            raise ClosedError("the service is shutting down")
        loop = asyncio.get_running_loop()
        entry = _Entry(
            image=image, top_k=top_k, future=loop.create_future(), on_dispatch=on_dispatch, arrived=time.perf_counter()
        )
        if deadline is not None:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise DeadlineError
            entry.timer = loop.call_later(remaining_s, _expire, entry)
        self._waiting[entry] = None
        self._idle.clear()
        self._pump()
        try:
            return await entry.future
        finally:
            self._waiting.pop(entry, None)
            if entry.timer is not None:
                entry.timer.cancel()

    async def close(self) -> None:
        """Take no more images, answer those that wait, and end the thread."""
        self._closed = True
        await self._idle.wait()
        self._thread.shutdown()

    def _pump(self) -> None:
        """Dispatch the next batch if the device is idle and somebody waits."""
        if self._busy:
            return
        batch = self._take()
        if not batch:
            self._idle.set()
            return
        self._busy = True
        started = time.perf_counter()
        for entry in batch:
            entry.on_dispatch()
            if entry.timer is not None:
                entry.timer.cancel()
        work = asyncio.get_running_loop().run_in_executor(
            self._thread,
            lambda: self._run(np.stack([entry.image for entry in batch]), max(entry.top_k for entry in batch)),
        )
        work.add_done_callback(lambda done: self._finish(batch, started, done))

    def _take(self) -> list[_Entry]:
        batch: list[_Entry] = []
        while self._waiting and len(batch) < self._max_batch:
            entry = next(iter(self._waiting))
            del self._waiting[entry]
            if not entry.future.done():  # else its deadline passed, or its client is gone
                batch.append(entry)
        return batch

    def _finish(self, batch: list[_Entry], started: float, work: asyncio.Future[Outputs]) -> None:
        inference_s = time.perf_counter() - started
        self._busy = False
        error = work.exception()
        if error:
            log.error("the model failed on a batch of %d", len(batch), exc_info=error)
        self._on_batch(BatchReport(size=len(batch), inference_s=inference_s))
        for row, entry in enumerate(batch):
            if entry.future.done():  # its client went while the model was at work
                continue
            if error:
                failure = InferenceError("the model failed on this batch")
                failure.__cause__ = error
                entry.future.set_exception(failure)
            else:
                queue_s = started - entry.arrived
                answer = Answer(outputs=work.result(), row=row, queue_s=queue_s, inference_s=inference_s)
                entry.future.set_result(answer)
        self._pump()


def _expire(entry: _Entry) -> None:
    if not entry.future.done():
        entry.future.set_exception(DeadlineError())
