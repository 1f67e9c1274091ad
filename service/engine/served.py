"""The served model: its queue, its reloads and its health."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref

from camcal.models.bundle import BundleError, Manifest, manifest_checksum
from camcal.models.canary import canary_images
from camcal.service.background import in_background
from camcal.service.engine.batching import Batcher, BatchReport
from camcal.service.engine.model import Model, load_model, stamp
from camcal.service.engine.proofs import Proofs
from camcal.service.engine.ranking import Ranking
from camcal.service.engine.session import DeviceError
from camcal.service.engine.soundness import Soundness
from camcal.service.memory import release_memory
from camcal.service.metrics import Metrics
from camcal.service.settings import Settings

log = logging.getLogger("camcal")

LATE_S = 5.0  # timeout for a reload to end after the test of its bundle was stopped
FREE_S = 0.2  # interval of the checks for the end of a replaced model


class ServedModel:
    """Runs the current model, and replaces it on request. Belongs to one event loop.

    A request reads `model` once and uses it to the end: a reload may replace it at any time.

    Args:
        settings: the settings of this worker.
        model: the first model.
        metrics: the metrics to update.
        proofs: tests bundles before they are loaded.
    """

    def __init__(self, settings: Settings, model: Model, metrics: Metrics, proofs: Proofs):
        first = model.sessions[0]
        # Keep these: a reloaded model must fit this batcher, even if the number of usable CPUs has changed.
        self._settings = settings.model_copy(update={"intra_threads": first.threads, "max_batch": first.max_batch})
        self.model = model
        self.batcher = Batcher(lanes=len(model.runs), max_batch=first.max_batch, on_batch=self._count_batch)
        self._metrics = metrics
        self._proofs = proofs
        self._soundness = Soundness(metrics, self._try_model)
        self._reloading = asyncio.Lock()
        self._reload_pending = False
        self._describe()

    @property
    def manifest(self) -> Manifest:
        """The manifest of the current model."""
        return self.model.manifest

    @property
    def broken(self) -> str | None:
        """The reason why the model needs a restart or a new bundle; None while it works."""
        return self._soundness.broken

    def postprocessing(self) -> contextlib.AbstractContextManager[None]:
        """Context manager for the code after inference; see `Soundness.postprocessing`."""
        return self._soundness.postprocessing()

    async def reload(self) -> None:
        """Load the bundle that is now in the folder. If that fails, log the reason and keep the current model.

        Running requests finish with the model that they started with. At most one reload waits for a running one: it
        loads whatever is in the folder by then.
        """
        if self._reload_pending:
            return
        self._reload_pending = True
        async with self._reloading:
            self._reload_pending = False
            old = self.model.label
            try:
                model = await in_background(lambda: load_model(self._settings, self._proofs))
                if len(model.runs) != len(self.model.runs):
                    raise DeviceError(f"the device is now {model.sessions[0].provider}; restart the server to use it")
                replaced, self.model = weakref.ref(self.model), model
                self._soundness.reset()
            except Exception as error:  # a bad bundle may cause anything, and must not stop a working server
                log.error("reload failed, still serving %s: %s", old, error)
                self._metrics.reloads.labels("failed").inc()
                return
            log.info("reloaded: model %s replaces %s", self.model.label, old)
            self._metrics.reloads.labels("done").inc()
            self._describe()
            await self._release(replaced)

    async def watch(self, period_s: float = 1.0) -> None:
        """Reload when files in the bundle's folder have changed, and then stayed the same for one period."""
        folder = self._settings.bundle
        seen = await in_background(lambda: stamp(folder))
        loaded = seen if await in_background(self._is_served) else ()  # the folder may have changed since loading
        while True:
            await asyncio.sleep(period_s)
            now = await in_background(lambda: stamp(folder))
            if now == seen and now != loaded:
                loaded = now
                await asyncio.shield(self.reload())
            seen = now

    def observe(self, model: Model, ranking: Ranking) -> None:
        """Count a prediction of `model` in the metrics: its group, its confidence, and the shift by calibration."""
        best = ranking.classes[0]
        group = model.manifest.classes[best].group
        calibrated = float(ranking.calibrated_probabilities[best])
        self._metrics.predictions.labels(group).inc()
        self._metrics.confidence.labels(group).observe(calibrated)
        self._metrics.shift.observe(calibrated - float(ranking.probabilities[best]))

    async def close(self) -> None:
        """Stop a running reload, and finish the images in the queue."""
        self._proofs.close()
        self._reload_pending = True  # blocks further reloads
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reloading.acquire(), LATE_S)
        await self.batcher.close()

    async def _release(self, replaced: weakref.ref[Model]) -> None:
        """Release the memory of a replaced model once its last request has finished."""
        end = time.monotonic() + self._settings.answer_s
        while replaced() is not None and time.monotonic() < end:
            await asyncio.sleep(FREE_S)
        await in_background(release_memory)

    def _is_served(self) -> bool:
        """Whether the bundle in the folder is the current model."""
        try:
            return manifest_checksum(self._settings.bundle) == self.model.digest
        except BundleError:  # the folder is being replaced
            return False

    async def _try_model(self) -> None:
        """Predict a test image from end to end; raises the same errors as a request."""
        model, ranker = self.model, self.model.ranker
        image = canary_images(model.manifest.preprocessing.input_size, 1)[0]
        result = await self.batcher.submit(model.runs, image, 1)
        with self.postprocessing():
            ranking = ranker.rank(result.outputs, result.row, 1, "balanced")
            ranker.rows(ranking)
            ranker.maps(result.outputs, result.row, ranking.classes)

    def _count_batch(self, report: BatchReport) -> None:
        if report.failed or report.invalid:
            self._soundness.fail("error" if report.failed else "answer")
        self._metrics.batch_size.observe(report.size)
        self._metrics.batch_padding.inc(self.model.sessions[0].bucket(report.size) - report.size)

    def _describe(self) -> None:
        manifest, session = self.manifest, self.model.sessions[0]
        info = self._metrics.model_info
        info.clear()
        info.labels(manifest.name, manifest.version, session.provider, str(len(manifest.classes))).set(1)
        self._metrics.device_fallback.set(session.fallback is not None)
