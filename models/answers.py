"""Checks of a graph's answers: their validity, and agreement with those recorded when its bundle was made.

N images, K classes, the k best of them, maps of h×w positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camcal.models.bundle import OUTPUTS, Manifest, Precision
from camcal.models.canary import TOP_K, Canary, canary_count, canary_images
from camcal.models.untrusted import BundleError

Answers = Mapping[str, NDArray[Any]]  # an array for each of OUTPUTS
RunGraph = Callable[[NDArray[np.uint8], int], Answers]  # images and top_k

EXACT = 1e-4  # within one answer: maps and their logits, logits and calibrated ones; relative above one
SUM = 1e-3  # of probabilities
# Between machines and engines, relative to the largest logit of the image; docs/explanation/serving.md has figures.
ALLOWED: dict[Precision, float] = {"fp32": 0.005, "fp16": 0.02, "int8": 0.1}
PROBABILITY = {"fp32": 0.01, "fp16": 0.05, "int8": 0.15}  # of calibrated probabilities, absolute


def faults(answers: Answers) -> dict[int, str]:
    """The reason why an answer is unusable, by the image's row: values that are not finite, unknown classes.

    Empty if all answers are usable.
    """
    found: dict[int, str] = {}
    for name in OUTPUTS:
        array = answers[name]
        if name == "top_classes":
            wrong = (array < 0) | (array >= answers["logits"].shape[1])
            reason = "top_classes holds a class that does not exist"
        else:
            wrong, reason = ~np.isfinite(array), f"{name} is not finite"
        if wrong.any():
            rows = wrong.reshape(len(wrong), -1).any(axis=1)
            found |= {int(row): reason for row in np.flatnonzero(rows) if int(row) not in found}
    return found


def check(answers: Answers, manifest: Manifest) -> None:
    """Raises BundleError unless these are answers that the service may give under `manifest`."""
    for reason in faults(answers).values():
        raise BundleError(f"the model's answer is wrong on an image that every model can take: {reason}")
    top_Nk, logits_NK, calibrated_NK = answers["top_classes"], answers["logits"], answers["calibrated_logits"]
    if any(len(set(row)) != len(row) for row in top_Nk.tolist()):
        raise BundleError("the model's top_classes names one class twice")
    ranked_Nk = np.take_along_axis(calibrated_NK, top_Nk, axis=1)
    best_Nk = -np.sort(-calibrated_NK, axis=1)[:, : top_Nk.shape[1]]
    _equal("top_classes, the classes of the highest calibrated logits,", ranked_Nk, best_Nk, EXACT)
    for name in ("probabilities", "calibrated_probabilities"):
        if (answers[name] < 0).any():
            raise BundleError(f"the model's {name} are below zero")
        _equal(f"the sum of {name}", answers[name].sum(axis=1, dtype=np.float64), np.ones(len(top_Nk)), SUM)
    sums_Nk = answers["maps"].sum(axis=(2, 3), dtype=np.float64)
    _equal("the sum of a map and its logit", sums_Nk, np.take_along_axis(logits_NK, top_Nk, axis=1), EXACT)
    c = manifest.calibration
    expected_NK = np.array(c.omega) * logits_NK + np.array(c.beta) * np.array(c.weight_norms)
    _equal("calibrated_logits, by the manifest's calibration,", calibrated_NK, expected_NK, EXACT)


def prove(run: RunGraph, manifest: Manifest, canary: Canary | None) -> None:
    """Run generated images and check the answers, also against those of `canary` if there is one.

    Raises:
        BundleError: if an output is off; says which, and by how much.
    """
    count = canary_count(len(manifest.classes)) if canary is None else len(canary.top_classes)
    answers = _answer(run, manifest, count)
    check(answers, manifest)
    if canary is None:
        return
    logits_NK, recorded_NK = answers["logits"], np.array(canary.logits)
    allowed = ALLOWED[manifest.precision]
    span = np.maximum(np.abs(recorded_NK).max(axis=1), 1)
    _recorded("logits", np.abs(logits_NK - recorded_NK).max(axis=1) / span, allowed)
    probabilities_NK = np.array(canary.calibrated_probabilities)
    differ_N = np.abs(answers["calibrated_probabilities"] - probabilities_NK).max(axis=1)
    _recorded("calibrated_probabilities", differ_N, PROBABILITY[manifest.precision])
    top_Nk = np.array(canary.top_classes)
    at_Nk = [np.take_along_axis(probabilities_NK, top, axis=1) for top in (answers["top_classes"], top_Nk)]
    _recorded("top_classes", np.abs(at_Nk[0] - at_Nk[1]).max(axis=1), 2 * PROBABILITY[manifest.precision])
    same_N = answers["top_classes"][:, 0] == top_Nk[:, 0]  # where two classes tie, either may be first
    maps_Nhw = np.array(canary.maps)
    span = np.maximum(np.abs(maps_Nhw).max(axis=(1, 2)), 1)
    differ_N = np.abs(answers["maps"][:, 0] - maps_Nhw).max(axis=(1, 2)) / span
    _recorded("maps", differ_N[same_N], allowed)


def record(run: RunGraph, manifest: Manifest) -> Canary:
    """The answers to compare with from now on. Raises BundleError if they are not valid, see `check`."""
    answers = _answer(run, manifest, canary_count(len(manifest.classes)))
    check(answers, manifest)
    return Canary(
        version=1,
        top_classes=answers["top_classes"].tolist(),
        logits=_short(answers["logits"]),
        calibrated_probabilities=_short(answers["calibrated_probabilities"]),
        maps=_short(answers["maps"][:, 0]),
    )


def _answer(run: RunGraph, manifest: Manifest, count: int) -> Answers:
    images = canary_images(manifest.preprocessing.input_size, count)
    top_k = min(TOP_K, len(manifest.classes))
    each = [run(image[None], top_k) for image in images]  # some services run one image at a time
    return {name: np.concatenate([answers[name] for answers in each]) for name in OUTPUTS}


def _short(values: NDArray[np.float32]) -> Any:
    """Nested lists with six significant digits, far more precise than the tolerance."""
    return np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[float])(values).tolist()


def _equal(what: str, found: NDArray[Any], expected: NDArray[Any], allowed: float) -> None:
    off = float((np.abs(found - expected) / np.maximum(np.abs(expected), 1)).max())
    if off > allowed:
        raise BundleError(
            f"the model's answers contradict themselves: {what} differ by {off:.2g}; {allowed:g} is allowed"
        )


def _recorded(name: str, differ_N: NDArray[Any], allowed: float) -> None:
    if len(differ_N) and (off := float(differ_N.max())) > allowed:
        raise BundleError(
            f"the model does not answer as it did when the bundle was made: {name} differ by {off:.2g}; {allowed:g} is "
            "allowed"
        )
