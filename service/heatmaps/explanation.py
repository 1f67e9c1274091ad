"""The stored data of a prediction from which its heatmaps are drawn: small and self-contained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from camcal.models.bundle import Calibration
from camcal.service.heatmaps.heatmap import Scale, Window, positive_scale, signed_scale
from camcal.service.heatmaps.legend import Caption, legible


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The maps of k classes of one prediction. Lists have k values in the order of `classes`."""

    expires_at: float  # Unix time
    classes: list[int]
    labels: list[str]
    logits: list[float]  # z
    calibrated_logits: list[float]  # z'
    scales: list[float]  # ω
    offsets: list[float]  # β·‖W‖
    picture_size: tuple[int, int]  # width, height
    picture: bytes  # JPEG of the part of the image that the network sees
    maps: NDArray[np.float32]  # k×h×w, plain
    window: Window | None = None  # of the picture in the grid; None for all of it
    owner: str | None = None  # name of the API key of the request

    def score(self, place: int, calibrated: bool, versus: int | None = None) -> float:
        """The logit of the class at `place`, minus that of the class at `versus` if given."""
        scores = self.calibrated_logits if calibrated else self.logits
        return scores[place] if versus is None else scores[place] - scores[versus]

    def contributions(self, place: int, calibrated: bool, versus: int | None = None) -> NDArray[np.float32]:
        """The h×w map of the class at `place`, minus that at `versus` if given. It sums to `score`."""
        if versus is not None:
            return self.contributions(place, calibrated) - self.contributions(versus, calibrated)
        plain: NDArray[np.float32] = self.maps[place]
        return marc_map(plain, self.scales[place], self.offsets[place]) if calibrated else plain

    def caption(self, place: int, calibrated: bool, versus: int | None = None) -> Caption:
        """The text of the legend."""
        kind = "calibrated" if calibrated else "plain"
        score = f"{self.score(place, calibrated, versus):.2f}"
        if versus is None:
            return Caption(title=self.title(place), detail=f"{kind} score {score}")
        return Caption(title=self.title(place), detail=f"{kind} difference {score}", rival=self.title(versus))

    def title(self, place: int) -> str:
        """The label of the class at `place`, or its number if the font cannot show the label."""
        return legible(self.labels[place], self.classes[place])

    def scale(self, place: int, calibrated: bool, versus: int | None, *, signed: bool, common: bool) -> Scale:
        """The colour scale of a heatmap.

        Args:
            place, calibrated, versus: see `contributions`.
            signed: centre the scale at zero; otherwise it starts at a floor.
            common: use one scale for all maps of this prediction, or for all differences of two of them, so that equal
                colours mean equal contributions. Otherwise each map has its own scale.
        """
        choose = signed_scale if signed else positive_scale
        if not common:
            return choose(self.contributions(place, calibrated, versus))
        maps = np.stack([self.contributions(k, calibrated) for k in range(len(self.classes))])
        if versus is None:
            return choose(maps)
        largest = float((maps.max(axis=0) - maps.min(axis=0)).max())
        return Scale(low=-largest if signed else 0.0, high=largest, signed=signed)

    def pack(self) -> bytes:
        """Serialize for a store: one line of JSON, the maps, the picture."""
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
        header["window"] = header["window"] and tuple(header["window"])
        return cls(**header, maps=maps, picture=body[end:])


def marc_map(plain: NDArray[np.float32], omega: float, offset: float) -> NDArray[np.float32]:
    """The calibrated map m'(u) = ω·m(u) + β·‖W‖/(h·w) of one class, where `offset` is β·‖W‖.

    It sums to the calibrated logit z', as the plain map m sums to z.
    """
    return (plain.astype(np.float64) * omega + offset / plain.size).astype(np.float32)


def offsets(calibration: Calibration, classes: list[int]) -> list[float]:
    """β_k·‖W_k‖ for each of `classes`."""
    return [calibration.beta[k] * calibration.weight_norms[k] for k in classes]
