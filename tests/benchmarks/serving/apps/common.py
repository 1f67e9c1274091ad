"""What every peer server shares: the bundle's graph, camcal's own decoder, and the same answer.

The peers need no heatmaps, so they ask the graph for probabilities alone; that is their advantage over camcal.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

from camcal.models.preprocessing import Preprocessing
from camcal.service.engine.decoding import Limits, decode

LIMITS = Limits(max_bytes=20_000_000, max_pixels=50_000_000)
MAX_BATCH = 32


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


class Model:
    """The ONNX file of the bundle that the environment names, on `threads` threads."""

    def __init__(self, threads: int) -> None:
        folder = Path(os.environ["BENCH_BUNDLE"])
        manifest = json.loads((folder / "manifest.json").read_bytes())
        self._labels = [entry["name"] for entry in manifest["classes"]]
        self._preprocessing = Preprocessing.model_validate(manifest["preprocessing"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        size = self._preprocessing.input_size
        self.run([np.zeros((size, size, 3), dtype=np.uint8)])

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The network's input of one image file, by camcal's own decoder or, if asked for, by Pillow alone."""
        if os.environ.get("BENCH_DECODER") == "pillow":
            return self._preprocessing.apply(Image.open(io.BytesIO(data)).convert("RGB"))
        return decode(data, self._preprocessing, LIMITS, picture=False).pixels

    def run(self, images: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """The five most probable classes of each decoded image."""
        feed = {"images": np.stack(images), "top_k": np.array(1, dtype=np.int64)}
        (probabilities,) = self._session.run(["calibrated_probabilities"], feed)
        return [{"predictions": self._top(row)} for row in probabilities]

    def predict(self, data: bytes) -> dict[str, Any]:
        """Decode and run one image."""
        return self.run([self.decode(data)])[0]

    def _top(self, row: NDArray[np.float32]) -> list[dict[str, Any]]:
        best = np.argsort(-row)[:5]
        return [{"class_id": int(k), "label": self._labels[k], "probability": float(row[k])} for k in best]
