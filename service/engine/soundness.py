"""Whether the model still answers: failures in a row, and what they mean."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from camcal.service.metrics import Metrics

log = logging.getLogger("camcal")

FAILURES = 5  # in a row: the model is broken, as after an error of the GPU that only a restart mends


class Soundness:
    """Counts the failures of a model: runs that failed, useless answers, and faults after a run.

    Args:
        metrics: where to count.
        try_model: answers a test image from end to end. Asked after `FAILURES` failures in a row, it tells a model that
            is broken from a client who found an image that the model cannot take.
    """

    def __init__(self, metrics: Metrics, try_model: Callable[[], Awaitable[None]]):
        self._metrics = metrics
        self._try_model = try_model
        self._failures = 0
        self._trial: asyncio.Future[None] | None = None

    @property
    def broken(self) -> str | None:
        """Why only a restart helps, or a new bundle; None while the model answers."""
        if self._failures < FAILURES or (self._trial is not None and not self._trial.done()):
            return None
        return f"the model failed {self._failures} times in a row; the log says why"

    def reset(self) -> None:
        """The model has answered, or is another one."""
        self._failures = 0

    def fail(self, reason: str) -> None:
        """Count a failure: of a run (`error`), of an `answer`, or what came `after`."""
        self._failures += 1
        self._metrics.failures.labels(reason).inc()
        if self._failures == FAILURES:
            self._trial = asyncio.ensure_future(self._try())

    @contextmanager
    def concluding(self) -> Iterator[None]:
        """What turns an answer into a response: a fault in it is a failure, its end shows that all is well."""
        try:
            yield
        except Exception:
            self.fail("after")
            raise
        self.reset()

    async def _try(self) -> None:
        with suppress(Exception):  # each is counted, and those of the model are logged
            await self._try_model()
            log.warning("after %d failures in a row the model answers a test image: it serves on", FAILURES)
