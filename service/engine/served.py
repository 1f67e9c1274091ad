"""The model that is served: its queue, its reloads, and whether it still answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from camcal.models.bundle import BundleError, Manifest, manifest_checksum
from camcal.models.canary import canary_images
from camcal.service.background import in_background
from camcal.service.engine.batching import Batcher, BatchReport
from camcal.service.engine.model import Model, load_model, stamp
from camcal.service.engine.prediction import Ranking
from camcal.service.engine.proofs import Proofs
from camcal.service.engine.session import DeviceError
from camcal.service.engine.soundness import Soundness
from camcal.service.metrics import Metrics
from camcal.service.settings import Settings

log = logging.getLogger("camcal")

LATE_S = 5.0  # for a reload to end after the trial of its bundle was ended


class ServedModel:
    """Runs the current model on what is submitted, and replaces it on request. Lives in one event loop.

    A request takes `model` once and uses that one to its end: a reload may replace it at any time.

    Args:
        settings: of this process.
        model: what to serve first.
        metrics: where to count.
        proofs: of the bundles that were tried.
    """

    def __init__(self, settings: Settings, model: Model, metrics: Metrics, proofs: Proofs):
        first = model.sessions[0]
        # Fixed for good: what a reload loads must fit this batcher, whatever CPUs the process is left by then.
        self._settings = settings.model_copy(update={"intra_threads": first.threads, "max_batch": first.max_batch})
        self.model = model
        self.batcher = Batcher(lanes=len(model.runs), max_batch=first.max_batch, on_batch=self._count_batch)
        self._metrics = metrics
        self._proofs = proofs
        self._soundness = Soundness(metrics, self._try_model)
        self._reloading = asyncio.Lock()
        self._reload_waits = False
        self._describe()

    @property
    def manifest(self) -> Manifest:
        """Of the current model."""
        return self.model.manifest

    @property
    def broken(self) -> str | None:
        """Why only a restart helps, or a new bundle; None while the model answers."""
        return self._soundness.broken

    def concluding(self) -> contextlib.AbstractContextManager[None]:
        """The block that turns an answer of the model into a response; see `Soundness.concluding`."""
        return self._soundness.concluding()

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
                model = await in_background(lambda: load_model(self._settings, self._proofs))
                if len(model.runs) != len(self.model.runs):
                    raise DeviceError(f"the device is now {model.sessions[0].provider}; restart to serve there")
                self.model = model
                self._soundness.reset()
            except Exception as error:  # whatever a bad bundle can cause must not end a service that works
                log.error("the bundle was not reloaded, %s stays: %s", old, error)
                self._metrics.reloads.labels("failed").inc()
                return
            log.info("model %s replaces %s", self.model.label, old)
            self._metrics.reloads.labels("done").inc()
            self._describe()

    async def watch(self, period_s: float = 1.0) -> None:
        """Reload whenever the files of the bundle's folder have changed, and then stayed the same for a period."""
        folder = self._settings.bundle
        seen = await in_background(lambda: stamp(folder))
        loaded = seen if await in_background(self._is_served) else ()  # it may have changed since it was loaded
        while True:
            await asyncio.sleep(period_s)
            now = await in_background(lambda: stamp(folder))
            if now == seen and now != loaded:
                loaded = now
                await asyncio.shield(self.reload())
            seen = now

    def observe(self, model: Model, ranking: Ranking) -> None:
        """Count an answer of `model` in the metrics: its group, its confidence, and how far calibration moved it."""
        best = ranking.classes[0]
        group = model.manifest.classes[best].group
        calibrated = float(ranking.calibrated_probabilities[best])
        self._metrics.predictions.labels(group).inc()
        self._metrics.confidence.labels(group).observe(calibrated)
        self._metrics.shift.observe(calibrated - float(ranking.probabilities[best]))

    async def close(self) -> None:
        """End a reload that goes on, and answer what waits."""
        self._proofs.close()
        self._reload_waits = True  # nobody needs another
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reloading.acquire(), LATE_S)
        await self.batcher.close()

    def _is_served(self) -> bool:
        """Whether the bundle in the folder is the current one."""
        try:
            return manifest_checksum(self._settings.bundle) == self.model.digest
        except BundleError:  # another one is just being put there
            return False

    async def _try_model(self) -> None:
        """Answer a test image from end to end; raises what a request would meet."""
        model, ranker = self.model, self.model.ranker
        image = canary_images(model.manifest.preprocessing.input_size, 1)[0]
        answer = await self.batcher.submit(model.runs, image, 1)
        with self.concluding():
            ranking = ranker.rank(answer.outputs, answer.row, 1, "balanced")
            ranker.rows(ranking)
            ranker.maps(answer.outputs, answer.row, ranking.classes)

    def _count_batch(self, report: BatchReport) -> None:
        if report.failed or report.useless:
            self._soundness.fail("error" if report.failed else "answer")
        self._metrics.batch_size.observe(report.size)
        self._metrics.batch_padding.inc(self.model.sessions[0].bucket(report.size) - report.size)

    def _describe(self) -> None:
        manifest, session = self.manifest, self.model.sessions[0]
        info = self._metrics.model_info
        info.clear()
        info.labels(manifest.name, manifest.version, session.provider, str(len(manifest.classes))).set(1)
        self._metrics.device_fallback.set(session.fallback is not None)
