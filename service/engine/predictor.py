"""Classify one image: decode it, queue it, run the model, rank the classes, and store the maps for its heatmaps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from opentelemetry import trace

from camcal.cpus import usable_cpus, yield_to_event_loop
from camcal.models.bundle import Prior
from camcal.service.engine.admission import Ticket
from camcal.service.engine.batching import InferenceResult
from camcal.service.engine.deadline import in_thread
from camcal.service.engine.decoding import Data, Decoded, LargeImageError, Limits, decode
from camcal.service.engine.large import LargeImages
from camcal.service.engine.model import Model
from camcal.service.engine.ranking import Ranking, explain
from camcal.service.engine.served import ServedModel
from camcal.service.heatmaps.stores import MapStore, new_id
from camcal.service.mailbox import Mailbox
from camcal.service.metrics import Metrics
from camcal.service.settings import Settings

log = logging.getLogger("camcal")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PredictionRequest:
    """The validated options of a request.

    cam: whether to store heatmaps, of the `top_k` top classes and of `cam_classes`. owner: the name of the API key that
    may read them; None for no restriction.
    """

    top_k: int
    prior: Prior
    cam: bool
    cam_classes: list[int]
    owner: str | None


@dataclass(frozen=True, kw_only=True)
class StoredMaps:
    """The classes whose heatmaps are stored, and their expiry as Unix time."""

    classes: list[int]
    expires_at: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result for one image. `stages` has the duration of each stage in seconds."""

    id: str
    model: Model
    ranking: Ranking
    width: int
    height: int
    stored: StoredMaps | None
    stages: dict[str, float]


class Predictor:
    """Classifies images with the served model. Belongs to one event loop.

    Args:
        settings: the settings of this worker.
        served: the model.
        store: the store for heatmaps.
        metrics: the metrics to update.
        decoder: the mailbox of the decoder process for large images; None decodes them in a thread.
        worker: the index of this worker, which is part of every id.
    """

    def __init__(
        self,
        settings: Settings,
        served: ServedModel,
        store: MapStore,
        metrics: Metrics,
        decoder: Mailbox | None,
        worker: int,
    ):
        threads = settings.decode_threads or usable_cpus()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=yield_to_event_loop)
        self._ordinary_bytes = settings.decode_bytes // threads
        self._limits = Limits(
            max_bytes=settings.max_bytes,
            max_pixels=settings.max_pixels,
            large_bytes=settings.large_bytes,
            decode_cpu_s=settings.decode_cpu_s,
        )
        self._large = LargeImages(decoder, self._limits, settings.queue_bytes // 4)
        self._cam_ttl_s = settings.cam_ttl_s
        self._served = served
        self.store = store
        self._metrics = metrics
        self._worker = worker

    async def in_thread(
        self, work: Callable[[], T], *, deadline: float = math.inf, after: Callable[[], None] = lambda: None
    ) -> T:
        """Run `work` in a decoding thread; see `deadline.in_thread`."""
        return await in_thread(self._threads, work, deadline=deadline, after=after)

    async def predict(
        self,
        model: Model,
        read: Callable[[], Data],
        request: PredictionRequest,
        *,
        deadline: float,
        place: Ticket,
        body: Ticket,
    ) -> Prediction:
        """Classify the image that `read` returns.

        Args:
            model: the model at the start of the request.
            read: returns the image file; called in a decoding thread.
            request: the options, valid for this model.
            deadline: in the time of `time.monotonic`.
            place: this image's ticket, which leaves the queue when the model takes the image.
            body: the ticket that holds the bytes for `read`. Same as `place`, unless a body contains several images.

        Raises:
            DeadlineError, QueueFullError, DecoderError, ClosedError, InferenceError: if there is no result in time.
            UnsupportedFormatError, ImageTooLargeError, UndecodableImageError, MemoryError: if the image is rejected.
        """
        arrived = time.perf_counter()

        decoded, decode_started = await self._decoded(model, read, request.cam, deadline, body)
        decode_s = time.perf_counter() - decode_started
        top_k = model.ranker.maps_needed(request.top_k, request.prior, request.cam, bool(request.cam_classes))
        result = await self._served.batcher.submit(
            model.runs, decoded.pixels, top_k, deadline=deadline, on_dispatch=place.leave
        )

        post_started = time.perf_counter()
        key = new_id(self._worker)
        with self._served.postprocessing():
            ranking = model.ranker.rank(result.outputs, result.row, request.top_k, request.prior)
            self._served.observe(model, ranking)
            stored = await self._store(key, model, result, ranking, decoded, request) if request.cam else None
        stages = {
            "decode": decode_s,
            "queue": decode_started - arrived + result.queue_s,
            "inference": result.inference_s,
            "post": time.perf_counter() - post_started,
        }
        for stage, seconds in stages.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        span = trace.get_current_span()  # does nothing without CAMCAL_OTEL
        span.set_attributes({f"camcal.{stage}_ms": seconds * 1000 for stage, seconds in stages.items()})
        return Prediction(
            id=key,
            model=model,
            ranking=ranking,
            width=decoded.width,
            height=decoded.height,
            stored=stored,
            stages=stages,
        )

    def close(self) -> None:
        """End all threads."""
        self._threads.shutdown()
        self._large.close()

    async def _decoded(
        self, model: Model, read: Callable[[], Data], picture: bool, deadline: float, body: Ticket
    ) -> tuple[Decoded, float]:
        """Decode in a thread, or in the decoder process if the image is large. Also returns the start time."""
        rule = model.manifest.preprocessing

        def decode_ordinary() -> tuple[Decoded, float]:
            started = time.perf_counter()
            return decode(read(), rule, self._limits, picture=picture, ordinary_bytes=self._ordinary_bytes), started

        try:
            return await self.in_thread(decode_ordinary, deadline=deadline, after=body.keep())
        except LargeImageError as error:
            # Without its traceback, which would keep this frame alive.
            large, started = error.with_traceback(None), time.perf_counter()
        self._metrics.large_images.inc()
        return await self._large.decode(large, rule, picture=picture, deadline=deadline), started

    async def _store(
        self,
        key: str,
        model: Model,
        result: InferenceResult,
        ranking: Ranking,
        decoded: Decoded,
        request: PredictionRequest,
    ) -> StoredMaps | None:
        """Store the maps. If the store fails, the prediction is returned without heatmaps."""
        started = time.perf_counter()
        stored = StoredMaps(
            classes=list(dict.fromkeys((*ranking.classes, *request.cam_classes))),
            expires_at=time.time() + self._cam_ttl_s,
        )
        explanation = explain(
            model.ranker, result.outputs, result.row, ranking, stored.classes, decoded, stored.expires_at, request.owner
        )
        try:
            await self.store.put(key, explanation.pack(), self._cam_ttl_s)
        except Exception as error:  # stores may raise anything: network or disk errors, no space
            log.warning("cannot store a heatmap: %s", error)
            self._metrics.store_failures.labels("put").inc()
            return None
        self._metrics.stage_seconds.labels("store").observe(time.perf_counter() - started)
        return stored
