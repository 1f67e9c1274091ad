"""Detect a broken model by counting consecutive failures."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from camcal.service.metrics import Metrics

log = logging.getLogger("camcal")

MAX_FAILURES = 5  # consecutive failures of a broken model, for example after a GPU error that only a restart fixes


class Soundness:
    """Counts the failures of a model: failed batches, invalid outputs, and errors after inference.

    Args:
        metrics: the metrics to update.
        try_model: predicts a test image from end to end. Called after `MAX_FAILURES` consecutive failures, to
            distinguish a broken model from a client who sends an image that the model cannot process.
    """

    def __init__(self, metrics: Metrics, try_model: Callable[[], Awaitable[None]]):
        self._metrics = metrics
        self._try_model = try_model
        self._failures = 0
        self._trial: asyncio.Future[None] | None = None

    @property
    def broken(self) -> str | None:
        """The reason why the model needs a restart or a new bundle; None while it works."""
        if self._failures < MAX_FAILURES or (self._trial is not None and not self._trial.done()):
            return None
        return f"the model failed {self._failures} times in a row; see the log"

    def reset(self) -> None:
        """Reset the count after a success, or for a new model."""
        self._failures = 0

    def fail(self, reason: str) -> None:
        """Count a failure: a failed batch (`error`), invalid outputs (`answer`), an error after inference (`after`)."""
        self._failures += 1
        self._metrics.failures.labels(reason).inc()
        if self._failures == MAX_FAILURES:
            self._trial = asyncio.ensure_future(self._try())

    @contextmanager
    def postprocessing(self) -> Iterator[None]:
        """Context manager for the code after inference: an error counts as a failure, success resets the count."""
        try:
            yield
        except Exception:
            self.fail("after")
            raise
        self.reset()

    async def _try(self) -> None:
        with suppress(Exception):  # counted by `fail`; errors of the model are logged
            await self._try_model()
            log.warning("after %d failures in a row, a test image succeeds: the model stays in use", MAX_FAILURES)
