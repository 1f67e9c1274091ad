"""What is kept of a prediction so that its heatmaps can be drawn later: small, and complete in itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from models.bundle import Calibration


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The maps of k classes of one prediction.

    Lists have k values in the order of `classes`.
    """

    expires_at: float  # Unix time
    classes: list[int]
    labels: list[str]
    logits: list[float]  # z
    calibrated_logits: list[float]  # z'
    scales: list[float]  # ω
    offsets: list[float]  # β·‖W‖
    picture_size: tuple[int, int]  # width, height
    picture: bytes  # JPEG of what the network saw
    maps: NDArray[np.float32]  # k×h×w, plain

    def score(self, place: int, calibrated: bool) -> float:
        """The logit that the map at `place` explains."""
        return (self.calibrated_logits if calibrated else self.logits)[place]

    def contributions(self, place: int, calibrated: bool) -> NDArray[np.float32]:
        """The map at `place` of `classes`, h×w; it sums to `score`."""
        plain: NDArray[np.float32] = self.maps[place]
        return marc_map(plain, self.scales[place], self.offsets[place]) if calibrated else plain

    def pack(self) -> bytes:
        """As bytes, for a store: one line of JSON, the maps, the picture."""
        header: dict[str, Any] = {name: value for name, value in vars(self).items() if name not in ("picture", "maps")}
        header["shape"] = self.maps.shape
        return orjson.dumps(header) + b"\n" + self.maps.astype("<f4").tobytes() + self.picture

    @classmethod
    def unpack(cls, data: bytes) -> Explanation:
        """The inverse of `pack`."""
        line, _, body = data.partition(b"\n")
        header = orjson.loads(line)
        shape = header.pop("shape")
        end = 4 * int(np.prod(shape))
        maps = np.frombuffer(body[:end], dtype="<f4").astype(np.float32).reshape(shape)
        header["picture_size"] = tuple(header["picture_size"])
        return cls(**header, maps=maps, picture=body[end:])


def marc_map(plain: NDArray[np.float32], omega: float, offset: float) -> NDArray[np.float32]:
    """The calibrated map m'(u) = ω·m(u) + β·‖W‖/(h·w) of one class, with `offset` β·‖W‖.

    It sums to the calibrated logit z' as the plain map sums to z.
    """
    return (plain.astype(np.float64) * omega + offset / plain.size).astype(np.float32)


def offsets(calibration: Calibration, classes: list[int]) -> list[float]:
    """β_k·‖W_k‖ for each of `classes`."""
    return [calibration.beta[k] * calibration.weight_norms[k] for k in classes]
