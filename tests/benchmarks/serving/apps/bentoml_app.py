"""BentoML: `bentoml serve bentoml_app:Classifier --port PORT`.

- Adaptive batching, at most 32 requests
  (https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html). `max_latency_ms` is high, because above it
  the server answers 503 (the same page, "Error handling"); the dispatcher still minimises the wait below it.
- One worker process for each core, since decoding and the model are CPU-bound; each has its session on one thread
  (https://docs.bentoml.com/en/latest/build-with-bentoml/parallelize-requests.html, "CPU workloads").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bentoml

from tests.benchmarks.serving.apps.common import MAX_BATCH, Model


@bentoml.service(
    workers="cpu_count", traffic={"timeout": 60}, metrics={"enabled": False}, logging={"access": {"enabled": False}}
)
class Classifier:
    """Decodes and runs a batch in one worker."""

    def __init__(self) -> None:
        self.model = Model(threads=1)

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=10_000)
    def predict(self, images: list[Path]) -> list[dict[str, Any]]:
        """The five most probable classes of each JPEG."""
        return self.model.run([self.model.decode(path.read_bytes()) for path in images])
