"""Rank the model's outputs under a class prior, for HTTP and the command line alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camcal.models.bundle import Manifest, Prior
from camcal.service.engine.decoding import Decoded
from camcal.service.engine.session import Outputs
from camcal.service.heatmaps.explanation import Explanation, offsets

DEFAULT_TOP_K = 5


def is_index(name: str, classes: int) -> bool:
    """Whether `name` is an index below `classes`: at most nine ASCII digits."""
    return name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < classes


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The result for one image: K values of each kind, and the top classes in descending order.

    `probabilities` are softmax(z) of the plain logits, for the prior of the training
    (`Calibration.probability_prior`); `calibrated_probabilities` are for the requested prior.
    """

    classes: list[int]
    logits: NDArray[np.float32]
    calibrated_logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    calibrated_probabilities: NDArray[np.float32]


class Ranker:
    """Ranks the classes of one model under a prior."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self.classes = len(manifest.classes)
        self._ids = {info.name: k for k, info in enumerate(manifest.classes)}
        counts = manifest.train_counts()
        self._log_priors: dict[Prior, NDArray[np.float64]] = {"train": np.log(counts / counts.sum())}
        if manifest.prior is not None:
            self._log_priors["given"] = np.log(manifest.prior)
        calibration = manifest.calibration
        self._temperatures: dict[Prior, float] = {
            prior: calibration.prior_temperatures.get(prior, calibration.temperature) for prior in self._log_priors
        }
        self.priors = manifest.priors

    def check_top_k(self, top_k: int | None) -> int:
        """The number of classes to return, by default min(DEFAULT_TOP_K, K). Raises ValueError outside 1..K."""
        if top_k is None:
            return min(DEFAULT_TOP_K, self.classes)
        if not 1 <= top_k <= self.classes:
            raise ValueError(f"top_k is {top_k}; the model has {self.classes} classes: expected 1 to {self.classes}")
        return top_k

    def check_prior(self, name: str) -> Prior:
        """The prior `name`. Raises ValueError if the model does not have it."""
        for prior in self.priors:
            if name == prior:
                return prior
        raise ValueError(f"prior is {name!r}; the model has {' and '.join(self.priors)}")

    def class_id(self, name: str) -> int:
        """The class of an index or a label. Digits below the number of classes are an index, anything else is a label.

        Raises:
            ValueError: if there is no such class.
        """
        if is_index(name, self.classes):
            return int(name)
        if (k := self._ids.get(name)) is None:
            indices = f"an index from 0 to {self.classes - 1}"
            raise ValueError(f"unknown class {name[:100]!r}; expected {indices}, or a label as in GET /model")
        return k

    def maps_needed(self, top_k: int, prior: Prior, cam: bool, others: bool = False) -> int:
        """The `top_k` input of the graph, which returns maps only for the classes with the highest calibrated logits.

        A prior other than `balanced`, or `others` besides the top classes, may need the map of any class: this returns
        K then. Maps cost little compared with the network: one product of h·w×C and C×K. A second run would cost more.
        """
        if prior == "balanced" and not (cam and others):
            return top_k
        return self.classes if cam else 1

    def rank(self, outputs: Outputs, row: int, top_k: int, prior: Prior) -> Ranking:
        """Rank the classes for image `row` of a batch that was run with `top_k` of at least `maps_needed`."""
        calibrated_logits = outputs.calibrated_logits[row]
        if prior == "balanced":
            classes = outputs.top_classes[row, :top_k]
            calibrated = outputs.calibrated_probabilities[row]
        else:
            # softmax(z'/T + log π), in float64, so that rounding does not change the order.
            shifted = calibrated_logits.astype(np.float64) / self._temperatures[prior] + self._log_priors[prior]
            classes = np.argsort(-shifted, kind="stable")[:top_k]
            odds = np.exp(shifted - shifted.max())
            calibrated = (odds / odds.sum()).astype(np.float32)
        return Ranking(
            classes=[int(k) for k in classes],
            logits=outputs.logits[row],
            calibrated_logits=calibrated_logits,
            probabilities=outputs.probabilities[row],
            calibrated_probabilities=calibrated,
        )

    def maps(self, outputs: Outputs, row: int, classes: list[int]) -> NDArray[np.float32]:
        """The plain contribution maps of `classes` for image `row`: k×h×w."""
        at = {int(k): place for place, k in enumerate(outputs.top_classes[row])}
        return outputs.maps[row, [at[k] for k in classes]]

    def rows(self, ranking: Ranking) -> list[dict[str, Any]]:
        """The `predictions` of a response, best first."""
        return [self._describe(k, ranking) for k in ranking.classes]

    def _describe(self, k: int, ranking: Ranking) -> dict[str, Any]:
        info = self.manifest.classes[k]
        return {
            "class_id": k,
            "label": info.name,
            "group": info.group,
            "train_count": info.train_count,
            "logit": float(ranking.logits[k]),
            "probability": float(ranking.probabilities[k]),
            "calibrated_logit": float(ranking.calibrated_logits[k]),
            "calibrated_probability": float(ranking.calibrated_probabilities[k]),
        }


def explain(
    ranker: Ranker,
    outputs: Outputs,
    row: int,
    ranking: Ranking,
    classes: list[int],
    decoded: Decoded,
    expires_at: float,
    owner: str | None = None,
) -> Explanation:
    """The data of image `row` of a batch to draw heatmaps of `classes`. The outputs must contain their maps."""
    manifest = ranker.manifest
    return Explanation(
        expires_at=expires_at,
        classes=classes,
        labels=[manifest.classes[k].name for k in classes],
        logits=[float(ranking.logits[k]) for k in classes],
        calibrated_logits=[float(ranking.calibrated_logits[k]) for k in classes],
        scales=[manifest.calibration.omega[k] for k in classes],
        offsets=offsets(manifest.calibration, classes),
        picture_size=decoded.picture_size,
        picture=decoded.picture,
        maps=ranker.maps(outputs, row, classes),
        window=manifest.window(decoded.width, decoded.height),
        owner=owner,
    )
