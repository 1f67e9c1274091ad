"""Work-conserving batching: an idle device starts at once, and batches grow only while the device is busy."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from camcal.cpus import yield_to_event_loop
from camcal.service.engine.deadline import DeadlineError
from camcal.service.engine.session import Outputs, RunBatch

log = logging.getLogger("camcal")

Checked = tuple[Outputs, dict[int, str]]  # and the faults of invalid rows


class ClosedError(RuntimeError):
    """The batcher accepts no more images."""


class InferenceError(RuntimeError):
    """The model failed on the image's batch, or its outputs for the image are invalid."""


@dataclass(frozen=True, kw_only=True)
class InferenceResult:
    """One image's row in the outputs of its batch."""

    outputs: Outputs
    row: int
    queue_s: float
    inference_s: float


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """One finished batch: its size and duration, whether it failed, and the number of images with invalid outputs."""

    size: int
    inference_s: float
    failed: bool = False
    invalid: int = 0


@dataclass(eq=False, kw_only=True)
class _Entry:
    runs: Sequence[RunBatch]
    image: NDArray[np.uint8]
    top_k: int
    future: asyncio.Future[InferenceResult]
    on_dispatch: Callable[[], None]
    arrived: float
    timer: asyncio.TimerHandle | None = None


class Batcher:
    """Runs waiting images in batches. Each lane of each device has its own thread.

    Belongs to one event loop. An image leaves the queue when it is dispatched, at its deadline, or when its caller is
    cancelled; the last two cost no time on the device. All images of a batch go to the same model.

    Args:
        lanes: maximum number of batches that run at once.
        max_batch: maximum batch size.
        on_batch: called after every batch.
    """

    def __init__(
        self, *, lanes: int = 1, max_batch: int, on_batch: Callable[[BatchReport], None] = lambda report: None
    ):
        self._max_batch = max_batch
        self._on_batch = on_batch
        self._waiting: dict[_Entry, None] = {}  # in order of arrival
        self._free = list(range(lanes))
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"inference-{i}", initializer=yield_to_event_loop)
            for i in range(lanes)
        ]
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def submit(
        self,
        runs: Sequence[RunBatch],
        image: NDArray[np.uint8],
        top_k: int,
        *,
        deadline: float | None = None,
        on_dispatch: Callable[[], None] = lambda: None,
    ) -> InferenceResult:
        """Run one image, and return its row of the outputs.

        Args:
            runs: the model, one function per lane. It takes the images, the largest top_k of the batch, and whether no
                other batch is running. Images share a batch only if `runs` is the same object.
            image: uint8, H×W×3.
            top_k: minimum number of maps.
            deadline: latest dispatch, in the time of `time.monotonic`.
            on_dispatch: called when the image leaves the queue for the device.

        Raises:
            DeadlineError: if the deadline passes before dispatch.
            ClosedError: after `close`.
            InferenceError: if the model fails on the batch or its outputs are invalid.
        """
        if self._closed:
            raise ClosedError("the service is shutting down")
        loop = asyncio.get_running_loop()
        entry = _Entry(
            runs=runs,
            image=image,
            top_k=top_k,
            future=loop.create_future(),
            on_dispatch=on_dispatch,
            arrived=time.perf_counter(),
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
            del entry  # see `camcal.service.engine.deadline.until`

    async def close(self) -> None:
        """Accept no more images, finish those in the queue, and end the threads."""
        self._closed = True
        await self._idle.wait()
        for thread in self._threads:
            thread.shutdown()

    def _pump(self) -> None:
        """Dispatch batches while a lane is free and images wait. Free lanes share the images equally."""
        while self._free:
            batch = self._take(-(-len(self._waiting) // len(self._free)))
            if not batch:
                if len(self._free) == len(self._threads):
                    self._idle.set()
                return
            self._dispatch(batch, self._free.pop())

    def _dispatch(self, batch: list[_Entry], lane: int) -> None:
        started = time.perf_counter()
        for entry in batch:
            entry.on_dispatch()
            if entry.timer is not None:
                entry.timer.cancel()
        images, top_k = [entry.image for entry in batch], max(entry.top_k for entry in batch)
        alone = not self._waiting and len(self._free) == len(self._threads) - 1
        run = batch[0].runs[lane]
        work = asyncio.get_running_loop().run_in_executor(self._threads[lane], _run, run, images, top_k, alone)
        work.add_done_callback(lambda done: self._finish(batch, lane, started, done))

    def _take(self, share: int) -> list[_Entry]:
        """Remove the next images from the queue: the oldest ones, all for the same model, at most `share`."""
        batch: list[_Entry] = []
        for entry in list(self._waiting):
            if entry.future.done():  # its deadline passed, or its client disconnected
                del self._waiting[entry]
            elif not batch or entry.runs is batch[0].runs:
                del self._waiting[entry]
                batch.append(entry)
                if len(batch) == min(share, self._max_batch):
                    break
        return batch

    def _finish(self, batch: list[_Entry], lane: int, started: float, work: asyncio.Future[Checked]) -> None:
        inference_s = time.perf_counter() - started
        self._free.append(lane)
        self._pump()  # first, so that the lane does not wait for the code below
        error, faults = work.exception(), dict[int, str]()
        if error:
            log.error("inference failed on a batch of %d images", len(batch), exc_info=error)
        else:
            outputs, faults = work.result()
        if faults:
            log.error(
                "invalid model outputs for %d of %d images: %s", len(faults), len(batch), next(iter(faults.values()))
            )
        for row, entry in enumerate(batch):
            if entry.future.done():  # its client disconnected meanwhile
                continue
            if error:
                failure = InferenceError("inference failed on this batch")
                failure.__cause__ = error
                entry.future.set_exception(failure)
            elif row in faults:
                entry.future.set_exception(InferenceError(faults[row]))
            else:
                queue_s = started - entry.arrived
                result = InferenceResult(outputs=outputs, row=row, queue_s=queue_s, inference_s=inference_s)
                entry.future.set_result(result)
        self._on_batch(
            BatchReport(size=len(batch), inference_s=inference_s, failed=error is not None, invalid=len(faults))
        )


def _run(run: RunBatch, images: Sequence[NDArray[np.uint8]], top_k: int, alone: bool) -> Checked:
    outputs = run(images, top_k, alone)
    return outputs, outputs.faults()


def _expire(entry: _Entry) -> None:
    if not entry.future.done():
        entry.future.set_exception(DeadlineError())
