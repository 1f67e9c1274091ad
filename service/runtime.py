"""What a running service is made of, and how a route reaches it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, TypeVar

from fastapi import Depends, FastAPI, Request

from camcal.cpus import usable_cpus, yield_to_event_loop
from camcal.models.bundle import BundleError, Manifest, manifest_checksum
from camcal.models.canary import canary_images
from camcal.service.address import client_address
from camcal.service.admission import Admission
from camcal.service.background import in_background
from camcal.service.batching import Batcher, BatchReport, DeadlineError
from camcal.service.deadline import until
from camcal.service.decoding import Limits
from camcal.service.errors import Problem
from camcal.service.large import DecoderProcess, LargeImages
from camcal.service.mailbox import Mailbox
from camcal.service.metrics import Metrics
from camcal.service.model import Model, load_model, stamp
from camcal.service.proofs import Proofs
from camcal.service.session import DeviceError
from camcal.service.settings import Settings
from camcal.service.siblings import DELETE, SharedStore, Siblings
from camcal.service.soundness import Soundness
from camcal.service.stores import MapStore
from camcal.service.stores.memory import MemoryStore

log = logging.getLogger("camcal")

T = TypeVar("T")

LATE_S = 5.0  # for a reload to end after the trial of its bundle was ended
PATIENT = 64  # requests that may wait for as long as it takes: a few dozen clients are no overload for a slow model


class Runtime:
    """The model served, with queue, threads and store. Made and closed inside one event loop.

    A request takes `model` once and uses that one to its end: a reload may replace it at any time.

    Args:
        settings: of this process.
        model: what to serve first.
        metrics: where to count.
        siblings: the other workers, if this process is one of several.
        decoder: what leads to the process that decodes large images, if another process has started it.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        metrics: Metrics,
        siblings: Siblings | None = None,
        decoder: Mailbox | None = None,
    ):
        first = model.sessions[0]
        # Fixed for good: what a reload loads must fit this batcher, whatever CPUs the process is left by then.
        self.settings = settings.model_copy(update={"intra_threads": first.threads, "max_batch": first.max_batch})
        self.model = model
        self.metrics = metrics
        self.limits = Limits(
            max_bytes=settings.max_bytes,
            max_pixels=settings.max_pixels,
            large_bytes=settings.large_bytes,
            decode_cpu_s=settings.decode_cpu_s,
        )
        self.draining = False
        self.soundness = Soundness(metrics, self._try_model)
        self._proofs = siblings.proofs if siblings else Proofs()
        self._reloading = asyncio.Lock()
        self._reload_waits = False
        self.admission = Admission(
            queue_limit=settings.queue_limit,
            queue_bytes=settings.queue_bytes,
            share=settings.client_share,
            queue_s=settings.queue_s,
            patient=PATIENT,
        )
        self.batcher = Batcher(lanes=len(model.runs), max_batch=model.sessions[0].max_batch, on_batch=self._count_batch)
        threads = settings.decode_threads or usable_cpus()
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=yield_to_event_loop)
        self.ordinary_bytes = settings.decode_bytes // threads
        self._decoder = None
        if decoder is None and sys.platform == "linux":
            loop = asyncio.get_running_loop()
            self._decoder = DecoderProcess(loop.add_reader, loop.remove_reader)
            decoder = self._decoder.mailbox
        self.large = LargeImages(decoder, self.limits, settings.queue_bytes // 4)
        self.drawings = Admission(
            queue_limit=settings.queue_limit,
            queue_bytes=0,
            share=settings.client_share,
            queue_s=settings.queue_s,
            patient=PATIENT,
        )
        # One thread of its own: many large heatmaps must not hold up decoding, for which the model waits.
        self.render = ThreadPoolExecutor(1, thread_name_prefix="render", initializer=yield_to_event_loop)
        memory = MemoryStore(settings.cam_max_bytes, lambda reason: metrics.store_evictions.labels(reason).inc())
        self.worker = siblings.index if siblings else 0
        self.own_store = memory
        self.store: MapStore = SharedStore(memory, siblings) if siblings else memory
        self._describe(memory)

    @property
    def manifest(self) -> Manifest:
        """Of the model that is served now."""
        return self.model.manifest

    @property
    def broken(self) -> str | None:
        """Why only a restart helps, or a new bundle; None while the model answers."""
        return self.soundness.broken

    @property
    def unready(self) -> str | None:
        """Why requests should go elsewhere; None while they should not."""
        return "the service is draining: it serves what still comes, and will stop" if self.draining else self.broken

    async def reload(self) -> None:
        """Serve the bundle that is now in the folder; if it is bad, the log says why and the old one stays.

        Requests that have begun end with the model they began with. While one reload goes on, only one other waits: it
        will find whatever is there by then.
        """
        if self._reload_waits:
            return
        self._reload_waits = True
        async with self._reloading:
            self._reload_waits = False
            old = self.model.label
            try:
                model = await in_background(lambda: load_model(self.settings, self._proofs))
                if len(model.runs) != len(self.model.runs):
                    raise DeviceError(f"the device is now {model.sessions[0].provider}; restart to serve there")
                self.model = model
                self.soundness.reset()
            except Exception as error:  # whatever a bad bundle can cause must not end a service that works
                log.error("the bundle was not reloaded, %s stays: %s", old, error)
                self.metrics.reloads.labels("failed").inc()
                return
            log.info("model %s replaces %s", self.model.label, old)
            self.metrics.reloads.labels("done").inc()
            self._describe_model()

    def drain(self) -> None:
        """Tell balancers to go elsewhere; requests that still come are served."""
        self.draining = True

    async def close(self) -> None:
        """Answer what waits, then give everything back."""
        self.draining = True
        self._proofs.close()
        self._reload_waits = True  # nobody needs another
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reloading.acquire(), LATE_S)  # the end of a reload
        await self.batcher.close()
        self.threads.shutdown()
        self.render.shutdown()
        self.large.close()
        if self._decoder:
            self._decoder.close()
        await self.store.close()

    async def in_thread(
        self,
        work: Callable[[], T],
        threads: ThreadPoolExecutor | None = None,
        *,
        deadline: float = math.inf,
        after: Callable[[], None] = lambda: None,
    ) -> T:
        """Run `work` in one of `threads`, by default those that decode.

        It is never started, or kept, if the caller has gone before or `deadline` has passed.

        Args:
            work: what to do. If it has begun, it goes on to its end, even if nobody waits for it any more.
            threads: where.
            deadline: end of the wait, in the time of `time.monotonic`.
            after: called in the event loop when `work` has ended or will never begin; that may be after this call.

        Raises:
            DeadlineError: at the deadline.
        """
        loop = asyncio.get_running_loop()
        held = [work]  # a cancelled item stays in the executor's queue, with all that it holds

        def begin() -> T:
            if time.monotonic() >= deadline:
                raise DeadlineError
            return held[0]()

        item = (threads or self.threads).submit(begin)
        try:
            return await until(deadline, asyncio.wrap_future(item))
        finally:
            held.clear()
            item.cancel()
            if item.running():
                item.add_done_callback(lambda _: loop.call_soon_threadsafe(after))
            else:
                after()
            del item  # see `camcal.service.deadline.until`

    async def draw(self, request: Request, work: Callable[[], T]) -> T:
        """Run `work` in the thread that draws heatmaps, unless the client of `request` leaves before.

        Raises:
            QueueFullError: if too many wait for it.
        """
        client = client_address(request.scope)
        self.drawings.check(client)
        with self.drawings.ticket(client) as ticket:
            ticket.join()
            return await unless_gone(request, self.in_thread(work, self.render))

    async def answer(self, question: str) -> bytes:
        """What another worker wants: `metrics`, the heatmap of an id, or `delete` and an id."""
        if question == "metrics":
            return await asyncio.to_thread(self.metrics.render)
        if question.startswith(DELETE):
            return b"1" if await self.own_store.delete(question.removeprefix(DELETE)) else b""
        return await self.own_store.get(question) or b""

    async def watch(self, period_s: float = 1.0) -> None:
        """Reload whenever the files of the bundle's folder have changed, and then stayed the same for a period."""
        folder = self.settings.bundle
        seen = await in_background(lambda: stamp(folder))
        loaded = seen if await in_background(self._is_served) else ()  # it may have changed since it was loaded
        while True:
            await asyncio.sleep(period_s)
            now = await in_background(lambda: stamp(folder))
            if now == seen and now != loaded:
                loaded = now
                await asyncio.shield(self.reload())
            seen = now

    def _is_served(self) -> bool:
        """Whether the bundle in the folder is the one that is served."""
        try:
            return manifest_checksum(self.settings.bundle) == self.model.digest
        except BundleError:  # another one is just being put there
            return False

    async def _try_model(self) -> None:
        """Answer a test image from end to end; raises what a request would meet."""
        model, ranker = self.model, self.model.ranker
        image = canary_images(model.manifest.preprocessing.input_size, 1)[0]
        answer = await self.batcher.submit(model.runs, image, 1)
        with self.soundness.concluding():
            ranking = ranker.rank(answer.outputs, answer.row, 1, "balanced")
            ranker.rows(ranking)
            ranker.maps(answer.outputs, answer.row, ranking.classes)

    def _count_batch(self, report: BatchReport) -> None:
        if report.failed or report.useless:
            self.soundness.fail("error" if report.failed else "answer")
        self.metrics.batch_size.observe(report.size)
        self.metrics.batch_padding.inc(self.model.sessions[0].bucket(report.size) - report.size)

    def _describe_model(self) -> None:
        metrics, manifest, session = self.metrics, self.manifest, self.model.sessions[0]
        metrics.model_info.clear()
        metrics.model_info.labels(manifest.name, manifest.version, session.provider, str(len(manifest.classes))).set(1)
        metrics.device_fallback.set(session.fallback is not None)

    def _describe(self, memory: MemoryStore) -> None:
        metrics = self.metrics
        self._describe_model()
        metrics.ready.set_function(lambda: self.unready is None)
        metrics.workers.set(self.settings.workers)
        metrics.queue_limit.set(self.settings.queue_limit)
        metrics.queue_depth.set_function(lambda: self.admission.depth)
        metrics.queue_bytes.set_function(lambda: self.admission.nbytes)
        metrics.store_entries.set_function(lambda: len(memory))
        metrics.store_bytes.set_function(lambda: memory.nbytes)


def running(app: FastAPI) -> Runtime | None:
    """The app's runtime, or None before its start and after its end."""
    runtime: Runtime | None = getattr(app.state, "runtime", None)
    return runtime


async def get_runtime(request: Request) -> Runtime:
    """The runtime that answers `request`. Raises Problem 503 when there is none."""
    if runtime := running(request.app):
        return runtime
    raise Problem("not-ready", "the model is not loaded")


Running = Annotated[Runtime, Depends(get_runtime)]


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client has left.

    The body of `request` must have been read: the next message of its connection is then the client's leaving.

    Raises:
        Problem: of kind `client-gone`.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    # What `asyncio.gather` gives counts as failed once it is cancelled, and a failure nobody looks at is logged.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem("client-gone", "the client left before its answer")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        del task, watch  # see `camcal.service.deadline.until`
