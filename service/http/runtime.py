"""What a running service is made of."""

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
from camcal.service.settings import Settings

T = TypeVar("T")

PATIENT = 64  # requests that may wait for as long as it takes: a few dozen clients are no overload for a slow model


class Runtime:
    """The served model with its predictor, queues, threads and store. Made and closed inside one event loop.

    Args:
        settings: of this process.
        model: what to serve first.
        metrics: where to count.
        siblings: the other workers, if this process is one of several.
        decoder: the mailbox of the process that decodes large images, if another process has started it.
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
        # One thread of its own: many large heatmaps must not hold up decoding, for which the model waits.
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
        """The one that is served now; a request takes it once, and uses it to its end."""
        return self.served.model

    @property
    def manifest(self) -> Manifest:
        """Of the model that is served now."""
        return self.served.manifest

    @property
    def broken(self) -> str | None:
        """Why only a restart helps, or a new bundle; None while the model answers."""
        return self.served.broken

    @property
    def unready(self) -> str | None:
        """Why requests should go elsewhere; None while they should not."""
        return "the service is draining: it serves what still comes, and will stop" if self.draining else self.broken

    def drain(self) -> None:
        """Tell balancers to go elsewhere; requests that still come are served."""
        self.draining = True

    async def close(self) -> None:
        """Answer what waits, then give everything back."""
        self.draining = True
        await self.served.close()
        self.predictor.close()
        self._render.shutdown()
        if self._decoder:
            self._decoder.close()
        await self.store.close()

    async def draw(self, client: str, work: Callable[[], T]) -> T:
        """Run `work` of a `client` in the thread that draws heatmaps.

        Raises:
            QueueFullError: if too many wait for it.
        """
        self.drawings.check(client)
        with self.drawings.ticket(client) as ticket:
            ticket.join()
            return await in_thread(self._render, work)

    async def answer(self, question: str) -> bytes:
        """What another worker wants: `metrics`, the heatmap of an id, or `delete` and an id."""
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
