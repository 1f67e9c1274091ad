"""LitServe: `python litserve_app.py PORT`.

- Batching: at most 32 requests, which share a run of the model
  (https://lightning.ai/docs/litserve/features/batching). A short timeout, since the load keeps its queue full:
  a longer one only adds to the latency of a single client.
- One worker process for each core, since decoding and the model are CPU-bound; each has its session on one thread
  (https://lightning.ai/docs/litserve/how-tos/parallelism-types).
- `fast_queue`: ZeroMQ "for high-throughput scenarios (>100 RPS)"
  (https://lightning.ai/docs/litserve/api-reference/litserver). As many API servers as workers is its default.
- The body is the file itself: a form cannot cross to the worker, and base64 in JSON is a third larger.
"""

import sys
from typing import Annotated, Any

import litserve as ls
import numpy as np
from fastapi import Body
from numpy.typing import NDArray

from tests.benchmarks.serving.apps.common import MAX_BATCH, Model, cores

BATCH_TIMEOUT_S = 0.001


class Classifier(ls.LitAPI):
    """Decodes and runs a batch in one worker."""

    def setup(self, device: str) -> None:
        self.model = Model(threads=1)

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/jpeg")]) -> NDArray[np.uint8]:
        return self.model.decode(request)

    def batch(self, inputs: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        return inputs

    def predict(self, x: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        return self.model.run(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = Classifier(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S)
    server = ls.LitServer(api, accelerator="cpu", devices=1, workers_per_device=cores(), fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
