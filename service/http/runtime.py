"""The parts of a running service."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from camcal.cpus import yield_to_event_loop
from camcal.models.bundle import Manifest
from camcal.service.engine.admission import Admission
from camcal.service.engine.deadline import in_thread
from camcal.service.engine.large import DecoderProcess
from camcal.service.engine.model import Model
from camcal.service.engine.predictor import Predictor
from camcal.service.engine.proofs import Proofs
from camcal.service.engine.served import ServedModel
from camcal.service.heatmaps.stores import MapStore
from camcal.service.heatmaps.stores.memory import MemoryStore
from camcal.service.http.siblings import DELETE, SharedStore, Siblings
from camcal.service.mailbox import Mailbox
from camcal.service.metrics import Metrics
from camcal.service.settings import PATIENT, Settings

T = TypeVar("T")


class Runtime:
    """The served model with its predictor, queues, threads and store. Created and closed in the same event loop.

    Args:
        settings: the settings of this process.
        model: the first model to serve.
        metrics: the metrics to update.
        siblings: the other workers, if this process is one of several.
        decoder: the mailbox of the process that decodes large images, if it runs already.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        metrics: Metrics,
        siblings: Siblings | None = None,
        decoder: Mailbox | None = None,
    ):
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        self.served = ServedModel(settings, model, metrics, siblings.proofs if siblings else Proofs())
        self.admission = _admission(settings, settings.queue_bytes)
        self.drawings = _admission(settings, 0)
        # A separate thread: large heatmaps must not delay decoding, for which the model waits.
        self._render = ThreadPoolExecutor(1, thread_name_prefix="render", initializer=yield_to_event_loop)
        self._own_store = MemoryStore(
            settings.cam_max_bytes, lambda reason: metrics.store_evictions.labels(reason).inc()
        )
        self.store: MapStore = SharedStore(self._own_store, siblings) if siblings else self._own_store
        self._decoder = None
        if decoder is None and sys.platform == "linux":
            loop = asyncio.get_running_loop()
            self._decoder = DecoderProcess(loop.add_reader, loop.remove_reader)
            decoder = self._decoder.mailbox
        worker = siblings.index if siblings else 0
        self.predictor = Predictor(settings, self.served, self.store, metrics, decoder, worker)
        self._describe()

    @property
    def model(self) -> Model:
        """The model that is served now. A request reads it once and keeps it until its end."""
        return self.served.model

    @property
    def manifest(self) -> Manifest:
        """The manifest of the model that is served now."""
        return self.served.manifest

    @property
    def broken(self) -> str | None:
        """Why the service needs a restart or a new bundle; None while the model works."""
        return self.served.broken

    @property
    def unready(self) -> str | None:
        """Why requests should go to another replica; None if the service is ready."""
        return "the service is draining and will stop" if self.draining else self.broken

    def drain(self) -> None:
        """Tell load balancers that the service is not ready. Requests that still arrive are served."""
        self.draining = True

    async def close(self) -> None:
        """Process the waiting requests, then release everything."""
        self.draining = True
        await self.served.close()
        self.predictor.close()
        self._render.shutdown()
        if self._decoder:
            self._decoder.close()
        await self.store.close()

    async def draw(self, client: str, work: Callable[[], T]) -> T:
        """Run `work` for a `client` in the thread that renders heatmaps.

        Raises:
            QueueFullError: if too many requests wait for it.
        """
        self.drawings.check(client)
        with self.drawings.places(client, 1):
            return await in_thread(self._render, work)

    async def answer(self, question: str) -> bytes:
        """The response to another worker, which asks for `metrics`, for the heatmap of an id, or to `delete` an id."""
        if question == "metrics":
            return await asyncio.to_thread(self.metrics.render)
        if question.startswith(DELETE):
            return b"1" if await self._own_store.delete(question.removeprefix(DELETE)) else b""
        return await self._own_store.get(question) or b""

    def _describe(self) -> None:
        metrics, store = self.metrics, self._own_store
        metrics.ready.set_function(lambda: self.unready is None)
        metrics.workers.set(self.settings.workers)
        metrics.queue_limit.set(self.settings.queue_limit)
        metrics.queue_depth.set_function(lambda: self.admission.depth)
        metrics.queue_bytes.set_function(lambda: self.admission.nbytes)
        metrics.store_entries.set_function(lambda: len(store))
        metrics.store_bytes.set_function(lambda: store.nbytes)


def _admission(settings: Settings, queue_bytes: int) -> Admission:
    return Admission(
        queue_limit=settings.queue_limit,
        queue_bytes=queue_bytes,
        share=settings.client_share,
        queue_s=settings.queue_s,
        patient=PATIENT,
    )
