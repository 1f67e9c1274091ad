"""Ray Serve: `python ray_app.py PORT`, with the environment that `servers.py` gives it.

- HAProxy in front and RAY_SERVE_THROUGHPUT_OPTIMIZED=1
  (https://docs.ray.io/en/latest/serve/advanced-guides/performance.html, "Enable throughput-optimized flags";
  https://docs.ray.io/en/master/kuberay/user-guides/serve-high-throughput.html).
- One replica for each core, since decoding and the model are CPU-bound, each with its session on one thread; the
  batch runs in a thread, so that the event loop stays free
  (https://docs.ray.io/en/latest/serve/advanced-guides/asyncio-best-practices.html, "Batching").
- `@serve.batch` of at most 32 without a wait: it takes what waits while a batch runs
  (https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html). `max_ongoing_requests` leaves room for two
  batches, where its default of 5 would cap them.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from tests.benchmarks.serving.apps.common import MAX_BATCH, Model, cores


@serve.deployment(num_replicas=cores(), max_ongoing_requests=2 * MAX_BATCH, ray_actor_options={"num_cpus": 1})
class Classifier:
    """Decodes and runs a batch in one replica."""

    def __init__(self) -> None:
        self.model = Model(threads=1)

    def _predict(self, images: list[bytes]) -> list[dict[str, Any]]:
        return self.model.run([self.model.decode(image) for image in images])

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.0)
    async def predict(self, images: list[bytes]) -> list[dict[str, Any]]:
        """The five most probable classes of each JPEG."""
        return await asyncio.to_thread(self._predict, images)

    async def __call__(self, request: Request) -> dict[str, Any]:
        answer: dict[str, Any] = await self.predict(await request.body())
        return answer


if __name__ == "__main__":
    ray.init(num_cpus=cores(), include_dashboard=False, logging_level="warning", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Classifier.bind(), route_prefix="/predict")  # type: ignore[attr-defined]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        serve.shutdown()
        ray.shutdown()
